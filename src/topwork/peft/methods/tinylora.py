"""TinyLoRA (arXiv:2602.04118): a few trained numbers mix fixed random matrices between the first
singular vectors of the weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.sites import Site


@dataclass(kw_only=True)
class TinyLoraConfig(LayerConfig):
    """W + B (Σ v_i P_i) A with B = U √S and A = √S Vᵀ of the weight's first `r` singular values."""

    r: int = 2
    u: int = 64
    """How many numbers v has."""
    weight_tying: float = 0.0
    """The share of layers that have no v of their own; 1: one v for all."""
    projection_seed: int = 42
    """The seed of the P of the first layer; the next one's is one more."""
    save_projection: bool = True
    """Write the P into the file."""
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool | str = True
    """v starts at zero; "uniform": within the bound, and so does False."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "TINYLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("u", self.u, 1)
        a_share("weight_tying", self.weight_tying if self.weight_tying != 1 else 0)
        a_share("tinylora_dropout", self.tinylora_dropout)
        one_of("bias", self.bias, ("none", "all", "tinylora_only"))
        one_of("init_weights", self.init_weights, (True, False, "uniform"))

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In files the groups' v are numbered below one name."""
        return {re.sub(r"\.tinylora_v(\d+)$", r".tinylora_v.\1", k): t for k, t in tensors.items()}


class TinyLora(Graft):
    KINDS = ("linear", "embedding")
    config: TinyLoraConfig

    @classmethod
    def share(cls, config: TinyLoraConfig, layers: list[tuple[str, Site]]) -> dict[str, Tensor]:
        groups = {group_of(config, index, len(layers)) for index in range(len(layers))}
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        return {
            f"tinylora_v{group}": nn.Parameter(torch.empty(config.u).uniform_(-bound, bound))
            for group in sorted(groups)
        }

    def create(self) -> dict[str, Tensor | nn.Module]:
        paths = [path for path, _ in self.shared.layers]
        index = paths.index(self.path)
        self.group = group_of(self.config, index, len(paths))
        left, sizes, right = torch.linalg.svd(self._as_stored(self.weight), full_matrices=False)
        r = min(self.config.r, len(sizes))
        roots = sizes[:r].sqrt()
        generator = torch.Generator().manual_seed(self.config.projection_seed + index)
        mixed = torch.normal(0.0, r**-0.5, (self.config.u, r, r), generator=generator)
        return {
            "tinylora_A": (roots[:, None] * right[:r]).contiguous(),
            "tinylora_B": (left[:, :r] * roots).contiguous(),
            "tinylora_P": mixed.to(self.layer.device),
        }

    def _as_stored(self, weight: Tensor) -> Tensor:
        """An embedding's weight is split as it is stored: [words, width]."""
        return weight.t() if self.site.kind == "embedding" else weight

    def saved(self) -> Iterable[tuple[str, Tensor]]:
        every = self.config.save_projection
        return [(name, t) for name, t in super().saved() if every or name != "tinylora_P"]

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, in], mixed, and B [out, r]; of an embedding for the weight as it is stored."""
        v = self.shared[f"tinylora_v{self.group}"].to(self.layer.device)
        mixed = torch.einsum("i,ijk->jk", v, self["tinylora_P"])
        return mixed @ self["tinylora_A"], self["tinylora_B"]

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), 1.0, self.config.tinylora_dropout)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return self._as_stored(b @ a)


def group_of(config: TinyLoraConfig, index: int, layers: int) -> int:
    """Which v the layer `index` of all `layers` has."""
    groups = max(1, round(layers * (1 - config.weight_tying)))
    return min(index // max(1, layers // groups), groups - 1)


CONFIG = TinyLoraConfig
GRAFT = TinyLora
