"""Adapters as files: what lies in a folder, how two differ, without the model below them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topwork import hub
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import state
from topwork.peft.config import FILE, PeftConfig
from topwork.peft.methods.lora import LoraConfig, scale_at

MODULE = state.PREFIX + "model."
VLLM_RANK = 16
"""The largest rank that vLLM takes unless told otherwise."""


@dataclass(frozen=True)
class LoraPair:
    """The change `scale` · B A of one linear: A [r, in], B [out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return max(self.inner(self), 0.0) ** 0.5

    def inner(self, other: LoraPair) -> float:
        """The Frobenius product of two changes, by r × r matrices alone."""
        left = self.b.double().T @ other.b.double()
        right = self.a.double() @ other.a.double().T
        return float((left * right).sum()) * self.scale * other.scale


def beyond_lora(config: PeftConfig) -> list[str]:
    """The options of an adapter that a reader of plain LoRA (vLLM, llama.cpp) leaves out."""
    if not isinstance(config, LoraConfig):
        return [f"peft_type={config.peft_type}"]
    variants = [name for name in config.VARIANTS if name != "velora_config"]  # of training alone
    options = ("lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")
    bias = ["bias"] if config.bias != "none" else []
    return bias + [name for name in (*variants, *options) if getattr(config, name)]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's two files, read."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, name_or_path: str | Path, **where: Any) -> AdapterFile:
        """Of a folder or a Hub id (`where`: revision, token …). CheckpointError, ConfigError."""
        folder = hub.resolve(name_or_path, want=("adapter",), **where).folder
        if not (folder / FILE).is_file():
            raise CheckpointError(f"{name_or_path}: there is no {FILE}, so this is no adapter")
        return cls(folder, PeftConfig.from_pretrained(folder), state.read(folder))

    @property
    def numbers(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def broken(self) -> list[str]:
        """The tensors with values that are not finite."""
        return [k for k, t in self.tensors.items() if not bool(torch.isfinite(t.float()).all())]

    def pairs(self) -> dict[str, LoraPair]:
        """The changes of linears by their paths. ConfigError for what is not LoRA's plain form."""
        if not isinstance(self.config, LoraConfig):
            raise ConfigError(f"{self.folder} is {self.config.peft_type}, not LORA")
        if self.config.use_dora:
            raise ConfigError(f"{self.folder} is DoRA: its change depends on the base's weight")
        found = {}
        for key, a in self.tensors.items():
            path, dot, _ = key.removeprefix(MODULE).partition(".lora_A.weight")
            twin = key.replace(".lora_A.weight", ".lora_B.weight")
            if dot and a.dim() == 2 and twin in self.tensors:
                found[path] = LoraPair(a, self.tensors[twin], scale_at(self.config, path))
        return found

    def besides_pairs(self) -> list[str]:
        """The tensors that `pairs` leaves out: biases, embeddings, whole modules."""
        used = {f"{MODULE}{path}.lora_{m}.weight" for path in self.pairs() for m in "AB"}
        return sorted(set(self.tensors) - used)


def elsewhere(file: AdapterFile) -> list[str]:
    """What other programs would do with an adapter, a line each."""
    beyond = beyond_lora(file.config)
    if not beyond:
        beyond = [f"{key}, which is no linear's" for key in file.besides_pairs()[:3]]
    if beyond:
        left = ", ".join(beyond)
        return [
            f"vLLM, llama.cpp: leave out {left}; merge it (topwork merge), or write its change as "
            "LoRA (topwork adapters convert --rank)"
        ]
    most = max((len(pair.a) for pair in file.pairs().values()), default=0)
    flag = f" with --max-lora-rank {most}" if most > VLLM_RANK else ""
    return [f"vLLM: loads it{flag}", "llama.cpp: topwork adapters convert writes it as .gguf"]


def find_adapters(folder: str | Path) -> Iterator[Path]:
    """The folders at and below `folder` that hold an adapter, in order of their paths."""
    for home, below, names in os.walk(folder):
        below.sort()
        if FILE in names:
            yield Path(home)


@dataclass(frozen=True)
class Difference:
    """What sets two adapters apart.

    `settings`: configuration fields and their two values. `only_first`, `only_second`: modules
    that one of them changes. `modules`: path → (norm of the first change, of the second, cosine).
    """

    settings: dict[str, tuple[Any, Any]]
    only_first: list[str]
    only_second: list[str]
    modules: dict[str, tuple[float, float, float]]


def compare(first: AdapterFile, second: AdapterFile) -> Difference:
    """For LoRA the changes of the weights are compared, for other methods the tensors."""
    one, two = first.config.to_dict(), second.config.to_dict()
    skip = {"inference_mode", "auto_mapping"}
    settings = {
        key: (one.get(key), two.get(key))
        for key in [*one, *(k for k in two if k not in one)]
        if key not in skip and one.get(key) != two.get(key)
    }
    lefts, rights = _parts(first), _parts(second)
    modules = {path: _angle(lefts[path], rights[path]) for path in lefts if path in rights}
    return Difference(
        settings,
        [path for path in lefts if path not in rights],
        [path for path in rights if path not in lefts],
        modules,
    )


def _parts(file: AdapterFile) -> dict[str, Any]:
    """What can be compared, by path: the changes of linears, else tensors."""
    if not isinstance(file.config, LoraConfig) or file.config.use_dora:
        return {key.removeprefix(MODULE): t for key, t in file.tensors.items()}
    rest = {key.removeprefix(MODULE): file.tensors[key] for key in file.besides_pairs()}
    return {**file.pairs(), **rest}


def _angle(left: Any, right: Any) -> tuple[float, float, float]:
    if isinstance(left, LoraPair) and isinstance(right, LoraPair):
        same = left.a.shape[1] == right.a.shape[1] and len(left.b) == len(right.b)
        norms, inner = (left.norm, right.norm), left.inner(right) if same else float("nan")
    elif isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.shape == right.shape
        flat = left.double().flatten(), right.double().flatten()
        norms = float(flat[0].norm()), float(flat[1].norm())
        inner = float(flat[0] @ flat[1]) if same else float("nan")
    else:
        return float("nan"), float("nan"), float("nan")
    return *norms, inner / max(norms[0] * norms[1], 1e-300)
