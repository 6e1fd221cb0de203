"""HiRA (ICLR 2025): the change of the weight is the weight itself, times a low-rank product."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.targets import by_pattern


@dataclass(kw_only=True)
class HiraConfig(LayerConfig):
    """W ⊙ (B A), elementwise."""

    r: int = 32
    hira_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | str = True
    """B starts at zero and A uniform; "gaussian": A normal with 1/r; False: both normal."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "HIRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("hira_dropout", self.hira_dropout)
        one_of("init_weights", self.init_weights, (True, False, "gaussian"))


class Hira(Graft):
    KINDS = ("linear", "conv", "embedding")
    config: HiraConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.r = by_pattern(self.config.rank_pattern, self.path, self.config.r)
        middle = "_embedding" if self.site.kind == "embedding" else ""
        self.names = (f"hira{middle}_A", f"hira{middle}_B")

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, ones = self.site, (1,) * len(self.site.kernel)
        if site.groups > 1:
            raise ConfigError(f"HIRA does not go to {self.path}, a convolution in groups")
        a = self.empty(self.r, site.inputs, *site.kernel)
        b = self.empty(site.outputs, self.r, *ones).normal_()
        if self.config.init_weights is True:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        else:
            a.normal_(std=1 / self.r if self.config.init_weights else 1.0)
        if self.config.init_weights:
            b.zero_()
        return {name: nn.Parameter(matrix) for name, matrix in zip(self.names, (a, b))}

    def _product(self) -> Tensor:
        """B A in the weight's shape."""
        a, b = (self[name] for name in self.names)
        return (b.flatten(1) @ a.flatten(1)).view(-1, self.site.inputs, *self.site.kernel)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.site.kind != "embedding":
            x = F.dropout(x, self.config.hira_dropout, self.layer.training)
        change = sites.read_weight(self.base).to(y.dtype) * self._product().to(y.dtype)
        return y + sites.apply_weight(self.base, x, change)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.weight * self._product(), bias


CONFIG = HiraConfig
GRAFT = Hira
