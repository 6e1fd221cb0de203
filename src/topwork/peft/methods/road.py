"""RoAd (arXiv:2409.00119): the layer's outputs are rotated and scaled in pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft

SHARES = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(kw_only=True)
class RoadConfig(LayerConfig):
    """Pairs (first half, second half of a group) turn by θ and stretch by α."""

    variant: str = "road_1"
    """"road_1": one θ and α for a pair; "road_2": one for each output; "road_4": two."""
    group_size: int = 64
    """Must divide the layer's outputs."""
    init_weights: bool = True
    """Start at no change; False: random."""
    peft_type: str = "ROAD"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("variant", self.variant, tuple(SHARES))
        at_least("group_size", self.group_size, 2)
        if self.group_size % 2:
            raise ConfigError(f"group_size={self.group_size} must be even")


class Road(Graft):
    config: RoadConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        group, outputs = self.config.group_size, self.site.outputs
        if outputs % group:
            raise ConfigError(f"group_size={group} does not divide the outputs of {self.path}")
        size = outputs // 2 * SHARES[self.config.variant]
        theta, alpha = self.empty(size).zero_(), self.empty(size).fill_(1.0)
        if not self.config.init_weights:
            theta.normal_(std=0.5)
            alpha.normal_(mean=1.0, std=0.5)
        return {"road_theta": nn.Parameter(theta), "road_alpha": nn.Parameter(alpha)}

    def _columns(self) -> tuple[Tensor, Tensor]:
        """α cos θ and α sin θ for each output."""
        theta, alpha = self["road_theta"], self["road_alpha"]
        group = self.config.group_size
        if self.config.variant == "road_1":
            theta, alpha = (
                v.view(-1, 1, group // 2).expand(-1, 2, -1).flatten() for v in (theta, alpha)
            )
        if self.config.variant == "road_4":
            theta, alpha = theta.view(-1, 2, group), alpha.view(-1, 2, group)
            first = alpha[:, 0] * theta[:, 0].cos()
            return first.flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
        return alpha * theta.cos(), alpha * theta.sin()

    def _turned(self, y: Tensor, dim: int) -> Tensor:
        """`y` with the outputs along `dim` turned."""
        y = y.movedim(dim, -1)
        first, second = (c.to(y.dtype) for c in self._columns())
        a, b = y.unflatten(-1, (-1, 2, self.config.group_size // 2)).unbind(-2)
        other = torch.stack([-b, a], -2).flatten(-3)
        return (y * first + other * second).movedim(-1, dim)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self._turned(y, -1)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._turned(weight, 0), None if bias is None else self._turned(bias, 0)


CONFIG = RoadConfig
GRAFT = Road
