"""A LoRA adapter as a .gguf file for llama.cpp (`--lora`): `general.type` "adapter"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from topwork.errors import CheckpointError, nearest
from topwork.weights.gguf_names import ARCHITECTURES, Architecture


class Pair(Protocol):
    """The change `scale` · B A of one linear: A [r, in], B [out, r]."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...


def write_gguf_adapter(
    path: Path, config: dict[str, Any], pairs: Mapping[str, Pair], name: str = ""
) -> None:
    """Write the changes of the linears at the paths of `pairs`, of a model of this `config`.

    llama.cpp scales each change by alpha / r with one alpha for the file; where `scale` is another,
    B takes up the difference. CheckpointError for a family or a module that llama.cpp has no name
    for.
    """
    import gguf

    kind, architecture = _architecture(config)
    homes = {path: part for part, path in kind.names.items()}
    tensors = {module: _part(module, kind, homes) for module in pairs}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    if name:
        writer.add_name(name)
    alpha = max((pair.scale * len(pair.a) for pair in pairs.values()), default=1.0)
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, pair in pairs.items():
        part = tensors[module]
        b = pair.b.float() * (pair.scale * len(pair.a) / alpha)
        b = _as_rows(b, part.rpartition(".")[2], kind, config)
        writer.add_tensor(f"{part}.weight.lora_a", pair.a.float().contiguous().numpy())
        writer.add_tensor(f"{part}.weight.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(config: dict[str, Any]) -> tuple[Architecture, str]:
    family = str(config.get("model_type"))
    known = {kind.model_type: (kind, name) for name, kind in ARCHITECTURES.items()}
    known["mistral"] = known["llama"]
    if family not in known:
        raise CheckpointError(
            f"adapters of {family!r} cannot be written as .gguf{nearest(family, known)}; known: "
            + ", ".join(known)
        )
    return known[family]


def _part(module: str, kind: Architecture, homes: dict[str, str]) -> str:
    """What llama.cpp calls the module: blk.3.attn_q."""
    layer, _, rest = module.removeprefix(kind.layers + ".").partition(".")
    if module.startswith(kind.layers + ".") and rest in homes:
        return f"blk.{layer}.{homes[rest]}"
    if module in homes:
        return homes[module]
    raise CheckpointError(f"llama.cpp has no name for {module} of {kind.model_type}")


def _as_rows(b: Tensor, part: str, kind: Architecture, config: dict[str, Any]) -> Tensor:
    """B with its rows in the file's order: the inverse of what reading does to the weight's."""
    heads = config.get("num_attention_heads")
    filled = {"num_key_value_heads": heads, "num_kv_heads": 1, **config}
    where = kind.convert(part, torch.arange(len(b)), filled)  # row here → row there
    moved = torch.empty_like(b)
    moved[where] = b
    return moved
