"""Models in a single .gguf file (llama.cpp's format, version 3): configuration and tensors.

The `gguf` library reads the file and undoes its quantisation, one tensor at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topwork.errors import CheckpointError, nearest
from topwork.weights.gguf_experts import EXPERTS, MIXTRAL
from topwork.weights.gguf_names import ARCHITECTURES as DENSE
from topwork.weights.gguf_names import Joined

ARCHITECTURES = {**DENSE, **EXPERTS}
MODEL_TYPES = {kind.model_type for kind in (*ARCHITECTURES.values(), MIXTRAL)}
LLAMA3_CONTEXTS = [1 << n for n in range(10, 18)]


class GgufFile:
    """One open file. CheckpointError when it is damaged, truncated or of an unknown kind."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the library raises many kinds for a damaged file
            raise CheckpointError(f"{path}: damaged or no GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self._need("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: architecture {self.architecture!r} is not supported"
                f"{nearest(self.architecture, ARCHITECTURES)}; known: {', '.join(ARCHITECTURES)}"
            )
        self._kind = ARCHITECTURES[self.architecture]
        if self.architecture == "llama" and self.get("*.expert_count"):
            self._kind = MIXTRAL
        if "token_embd.weight" not in self._tensors:
            raise CheckpointError(f"{path}: there is no tensor 'token_embd.weight'")

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`; "*" stands for the architecture."""
        found = self._reader.get_field(key.replace("*", getattr(self, "architecture", "*")))
        return default if found is None else found.contents()

    def _need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata lacks {key!r}")
        return value

    def has(self, name: str) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self._tensors

    def shape(self, part: str) -> list[int]:
        """The shape of a layer's part (with its ending), in the first layer that has it."""
        for name, tensor in self._tensors.items():
            if re.fullmatch(rf"blk\.\d+\.{re.escape(part)}", name):
                return [int(n) for n in reversed(tensor.shape)]
        raise CheckpointError(f"{self.path}: no layer has a tensor {part!r}")

    def vector(self, name: str) -> list[float] | None:
        """The numbers of a tensor that is part of the configuration; None when it is not there."""
        found = self._tensors.get(name)
        return None if found is None else self._dequantised(found).tolist()

    def config(self) -> dict[str, Any]:
        """What config.json would say of this model."""
        kind = self._kind
        config: dict[str, Any] = {"model_type": kind.model_type}
        for key, source in kind.keys.items():
            config[key] = self.get(source) if key in kind.optional else self._need(source)
        heads = config.get("num_attention_heads")
        if "num_key_value_heads" in kind.keys and config["num_key_value_heads"] is None:
            config["num_key_value_heads"] = heads
        if "head_dim" in kind.keys and config["head_dim"] is None:
            config["head_dim"] = config["hidden_size"] // heads
        config |= {
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }
        scaling = self._rope_scaling(config)
        if scaling is not None:
            config["rope_scaling"] = scaling
        config |= kind.more(self, config)
        return {key: value for key, value in config.items() if value is not None}

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """How the rotary angles are stretched; None: not at all, or the architecture says."""
        scaling = self.get("*.rope.scaling.type", "none")
        factors = self.vector("rope_freqs.weight")
        if factors is not None:
            return _llama3(factors, config)
        if scaling == "none" or (scaling == "longrope" and self.has("rope_factors_long.weight")):
            return None
        if scaling not in ("linear", "yarn"):
            raise CheckpointError(f"{self.path}: rope scaling {scaling!r} is not supported")
        found = {"rope_type": scaling, "factor": self._need("*.rope.scaling.factor")}
        original = self.get("*.rope.scaling.original_context_length")
        if scaling == "yarn" and original:
            found["original_max_position_embeddings"] = original
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            value = self.get(f"*.rope.scaling.{name}")
            if scaling == "yarn" and value is not None:
                found[key] = value
        return found

    def tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Each tensor's name in the module, and a function that reads it as fp32."""
        config = self.config()
        joined = {part: whole for whole in self._kind.joined for part in whole.parts}
        for tensor in self._reader.tensors:
            if tensor.name.startswith(("rope_freqs.", "rope_factors_")):
                continue  # part of the configuration
            layer, _, part = tensor.name.removeprefix("blk.").partition(".")
            if part in joined:
                if part == joined[part].parts[0]:
                    name = f"{self._kind.layers}.{layer}.{joined[part].path}"
                    yield name, partial(self._join, layer, joined[part])
                continue
            name, part = self._module_name(tensor.name)
            if "#" not in name:
                yield name, partial(self._read, tensor, part, config)
                continue
            for i in range(len(tensor.data)):
                yield name.replace("#", str(i)), partial(self._dequantised, tensor, i)

    def _join(self, layer: str, whole: Joined) -> Tensor:
        names = [f"blk.{layer}.{part}" for part in whole.parts]
        absent = [name for name in names if name not in self._tensors]
        if absent:
            raise CheckpointError(f"{self.path}: {names[0]} is there, but not {absent[0]}")
        return whole.join([self._dequantised(self._tensors[name]) for name in names])

    def _module_name(self, name: str) -> tuple[str, str]:
        """The tensor's name on the Hub, with "#" where it holds all experts, and its part."""
        old = re.fullmatch(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight", name)
        if old is not None:  # the first files with experts had them one by one
            stacked, part = self._module_name(f"{old.group(1)}_exps.weight")
            return stacked.replace("#", old.group(2)), part
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        names = self._kind.names
        if self.has("blk.0.attn_norm_2.weight"):  # Falcon 40B tells its two norms apart
            names = {**names, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
        if match is None or match.group(2) not in names:
            raise CheckpointError(f"{self.path}: unknown tensor {name!r}")
        layer, part, leaf = match.groups()
        home = names[part] if layer is None else f"{self._kind.layers}.{layer}.{names[part]}"
        return f"{home}.{leaf}", part

    def _read(self, tensor: Any, part: str, config: dict[str, Any]) -> Tensor:
        return self._kind.convert(part, self._dequantised(tensor), config)

    def _dequantised(self, tensor: Any, expert: int | None = None) -> Tensor:
        """The tensor, or what of it belongs to one expert."""
        import gguf

        data = tensor.data if expert is None else tensor.data[expert]
        try:
            array = gguf.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{self.path}: {tensor.name}: cannot read {kind}") from error
        value = torch.from_numpy(array.copy()).float()
        shape = [int(n) for n in reversed(tensor.shape)]
        return value.reshape(shape if expert is None else shape[1:])


def _llama3(factors: list[float], config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file holds by how much each angle is divided.

    The parameters are those that give these numbers; if none do, the numbers themselves stand in
    a scaling that divides by them whatever the length.
    """
    found = torch.tensor(factors)
    steps = torch.arange(0, 2 * len(factors), 2, dtype=torch.int64).float() / (2 * len(factors))
    plain = 1.0 / (config.get("rope_theta") or 10000.0) ** steps
    stretch = float(found.max())
    for original in LLAMA3_CONTEXTS:
        turns = original * plain / (2 * math.pi)
        blend = ((turns - 1.0) / 3.0).clamp(0, 1)
        wanted = 1 / ((1 - blend) / stretch + blend)
        if torch.allclose(wanted, found, rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": stretch, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": original,
            }  # fmt: skip
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }  # fmt: skip
