"""What LoHa and LoKr share: a dense change of the weight, dropped by rows or as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from topwork.peft import sites
from topwork.peft.config import LayerConfig, a_share, at_least
from topwork.peft.graft import Graft
from topwork.peft.targets import by_pattern


@dataclass(kw_only=True)
class LycorisConfig(LayerConfig):
    """The fields of both methods."""

    r: int = 8
    alpha: float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_dropout: float = 0.0
    """Dropout on the rows of the change."""
    module_dropout: float = 0.0
    """How often a layer goes without its adapter in training."""
    use_effective_conv2d: bool = False
    """Give a convolution's kernel its own core instead of counting it as inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("rank_dropout", self.rank_dropout)
        a_share("module_dropout", self.module_dropout)


class Lycoris(Graft):
    """scale · a change of the weight that a method builds."""

    KINDS = ("linear", "conv")
    config: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.r = by_pattern(self.config.rank_pattern, self.path, self.config.r)
        alpha = by_pattern(self.config.alpha_pattern, self.path, self.config.alpha)
        self.scale = alpha / self.r
        kernel = self.site.kernel
        self.core = self.config.use_effective_conv2d and max(kernel, default=1) > 1
        if self.core and len(kernel) > 2:
            sites.refuse("use_effective_conv2d", self.path, self.base, ("conv",))
        self.inputs = self.site.inputs // self.site.groups

    def scaled(self, change: Tensor) -> Tensor:
        """`change` in the weight's shape, by the scale."""
        return (change * self.scale).reshape(self.site.outputs, self.inputs, *self.site.kernel)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        config, training = self.config, self.layer.training
        if training and config.module_dropout and torch.rand(()) <= config.module_dropout:
            return y
        change = self.delta()
        if training and config.rank_dropout:
            keep = (torch.rand(change.shape[0]) > config.rank_dropout).to(change)
            if getattr(config, "rank_dropout_scale", True):
                keep = keep / keep.mean().clamp(min=1e-6)
            change = change * keep.view(-1, *(1,) * (change.dim() - 1))
        return y + sites.apply_weight(self.base, x, change)


def with_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A kernel core [r, r, *k] between a [r, out] and b [r, in] → [out, in, *k]."""
    return torch.einsum("ijkl,ip,jq->pqkl", core, a, b)
