"""Lily (arXiv:2407.09946): neighbouring layers share A, all share several B, and a router on each
layer says how much of which B counts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, at_least
from topwork.peft.graft import Graft
from topwork.peft.sites import Site
from topwork.peft.targets import ends
from topwork.peft.tensors import Matrix


@dataclass(kw_only=True)
class LilyConfig(LayerConfig):
    """scaling · Σ_e p_e A x B_e, p being the mean over all tokens of softmax(R A x).

    Layers share where one entry of `target_modules` names them and their weights have one shape.
    """

    r: int = 32
    stride_A: int = 1  # noqa: N815 (the name in files)
    """How many layers in a row share one A."""
    num_B: int = 2  # noqa: N815 (the name in files)
    scaling: float = 1.0
    init_weights: bool = True
    """The B start at zero; False: they are random."""
    peft_type: str = "LILY"

    @property
    def beyond_rows(self) -> str | None:
        return "mixes by all tokens of a pass (LILY)"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("stride_A", self.stride_A, 1)
        at_least("num_B", self.num_B, 2)


class Lily(Graft):
    config: LilyConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, site = self.config, self.site
        group = groups(config, self.shared.layers)[self.path]
        at = group.index(self.path)
        first = group[at - at % config.stride_A]
        made = self.shared.made
        if (first, "lily_A") not in made:
            made[first, "lily_A"] = self._matrix(config.r, site.inputs)
        if (group[0], "lily_B") not in made:
            b = self._matrix(config.num_B * config.r, site.outputs)
            if config.init_weights:
                nn.init.zeros_(b.weight)
            made[group[0], "lily_B"] = b
        return {
            "lily_A": made[first, "lily_A"],
            "lily_B": made[group[0], "lily_B"],
            "lily_router": self._matrix(config.num_B, config.r),
        }

    def _matrix(self, rows: int, columns: int) -> Matrix:
        bound = 1 / math.sqrt(columns)
        return Matrix(self.empty(rows, columns).uniform_(-bound, bound))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b, router = (self[n].to(y) for n in ("lily_A", "lily_B", "lily_router"))
        low = F.linear(x, a)
        shares = F.linear(low, router).float().softmax(-1).flatten(0, -2).mean(0).to(y.dtype)
        mixed = (shares[:, None, None] * b.view(len(shares), -1, b.shape[1])).sum(0)
        return y + low @ mixed * self.config.scaling

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(
            f"{self.path}: LILY mixes by what it sees and cannot be merged into a weight"
        )


def groups(config: LilyConfig, layers: list[tuple[str, Site]]) -> dict[str, list[str]]:
    """Each layer's path → the paths of all layers that share with it, in the model's order."""
    targets = config.target_modules
    found: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for path, site in layers:
        if targets == "all-linear":
            name = path.rpartition(".")[2]
        else:
            name = targets if isinstance(targets, str) else longest(path, targets or [])
        found[name, site.outputs, site.inputs].append(path)
    return {path: group for group in found.values() for path in group}


def longest(path: str, names: list[str]) -> str:
    """The most exact of the target `names` that `path` ends with."""
    return max((name for name in names if ends(path, name)), key=len)


CONFIG = LilyConfig
GRAFT = Lily
