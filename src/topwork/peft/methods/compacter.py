"""Compacter (arXiv:2106.04647): a bottleneck adapter whose matrices are sums of Kronecker products,
Σᵢ Rᵢ ⊗ (Lᵢ Uᵢ), with rules R shared by all layers. peft has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import at_least
from topwork.peft.methods.bottleneck import Bottleneck, BottleneckConfig
from topwork.peft.sites import Site
from topwork.peft.tensors import Bare


@dataclass(kw_only=True)
class CompacterConfig(BottleneckConfig):
    """The bottleneck's fields, and those of its matrices."""

    reduction_factor: float = 32
    non_linearity: str = "gelu"
    phm_dim: int = 4
    """How many products a matrix is the sum of, and the rules' side; divides both its sides."""
    phm_rank: int = 1
    """The rank of Lᵢ Uᵢ."""
    shared_phm_rule: bool = True
    """One set of rules for all layers; False: one for each matrix."""
    phm_init_range: float = 0.0001
    """The spread of L and U at the start."""
    peft_type: str = "COMPACTER"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("phm_dim", self.phm_dim, 1)
        at_least("phm_rank", self.phm_rank, 1)


def rules(n: int) -> Tensor:
    """Rules [n, n, n] at the start."""
    return torch.randn(n, n, n) * 0.01


class Compacter(Bottleneck):
    config: Any

    @classmethod
    def share(cls, config: CompacterConfig, layers: list[tuple[str, Site]]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {"compacter_rule": nn.Parameter(rules(config.phm_dim))}
        return made if config.shared_phm_rule else {}

    def create(self) -> dict[str, Tensor | nn.Module]:
        inputs, width, outputs = self.widths()
        made: dict[str, Tensor | nn.Module] = {}
        for side, rows, columns in (("down", width, inputs), ("up", outputs, width)):
            n, r, spread = self.config.phm_dim, self.config.phm_rank, self.config.phm_init_range
            if rows % n or columns % n:
                raise ConfigError(
                    f"phm_dim={n} does not divide {rows} and {columns}, the bottleneck's sides at "
                    f"{self.path}; choose another reduction_factor"
                )
            left = self.empty(n, columns // n, r).normal_(std=spread)
            right = self.empty(n, r, rows // n).normal_(std=spread)
            if side == "up" and self.config.init_weights:
                right.zero_()
            tensors = {"left": left, "right": right, "bias": self.empty(rows).zero_()}
            if not self.config.shared_phm_rule:
                tensors["rule"] = rules(n).to(left.device)
            made |= {f"compacter_{side}_{name}": Bare(t) for name, t in tensors.items()}
        return made

    def linear(self, side: str) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias of one side."""
        if self.config.shared_phm_rule:
            rule = self.shared["compacter_rule"].to(self.layer.device)
        else:
            rule = self[f"compacter_{side}_rule"]
        inner = self[f"compacter_{side}_left"] @ self[f"compacter_{side}_right"]
        weight = torch.einsum("iab,icd->bdac", rule, inner).flatten(0, 1).flatten(1)
        return weight, self[f"compacter_{side}_bias"]


CONFIG = CompacterConfig
GRAFT = Compacter
