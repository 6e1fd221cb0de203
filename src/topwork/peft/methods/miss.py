"""MiSS (arXiv:2409.15371): one block of rows, added to every block of the weight's inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class MissConfig(LayerConfig):
    """The inputs are summed in r interleaved parts and go through one matrix [r, out]."""

    r: int = 64
    mini_r: int = 1
    """With init_weights="mini": the matrix is [r, mini_r], repeated along the outputs."""
    miss_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool | str = True
    """True and "mini" start at zero; "bat" also multiplies the weight; False: random."""
    peft_type: str = "MISS"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("mini_r", self.mini_r, 1)
        a_share("miss_dropout", self.miss_dropout)
        one_of("bias", self.bias, ("none", "all", "miss_only"))
        one_of("init_weights", self.init_weights, (True, False, "bat", "mini"))


class Miss(Graft):
    config: MissConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        r, site, kind = self.config.r, self.site, self.config.init_weights
        if r > site.inputs:
            raise ConfigError(f"r={r} is more than the {site.inputs} inputs of {self.path}")
        if kind == "bat" and (site.inputs % r or site.outputs % r):
            raise ConfigError(f"init_weights='bat': r={r} does not divide the sides of {self.path}")
        if kind == "mini" and site.outputs % self.config.mini_r:
            raise ConfigError(
                f"mini_r={self.config.mini_r} does not divide the outputs of {self.path}"
            )
        shapes = {"bat": (site.outputs // r, r, r), "mini": (r, self.config.mini_r)}
        block = self.empty(*shapes.get(str(kind), (r, site.outputs))).zero_()
        if kind is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        return {"miss_block": nn.Parameter(block)}

    def _block(self) -> Tensor:
        block = self["miss_block"]
        if self.config.init_weights == "mini":
            block = block.repeat(1, self.site.outputs // self.config.mini_r)
        return block

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.config.init_weights == "bat":
            return super().after(x, y)
        block = self._block().to(x.dtype)
        r = block.shape[0]
        x = F.pad(
            F.dropout(x, self.config.miss_dropout, self.layer.training), (0, -x.shape[-1] % r)
        )
        return y + x.unflatten(-1, (-1, r)).sum(-2) @ block

    def delta(self) -> Tensor:
        if self.config.init_weights == "bat":
            return self._bat(self.weight)
        block, inputs = self._block(), self.site.inputs
        return block.t().repeat(1, -(-inputs // block.shape[0]))[:, :inputs]

    def _bat(self, weight: Tensor) -> Tensor:
        """W in blocks [out/r, r, in/r, r]; each block w of output group o gives w Bₒ + Bₒ."""
        block = self["miss_block"].float()
        r = block.shape[-1]
        parts = weight.view(weight.shape[0] // r, r, -1, r).permute(2, 0, 1, 3)
        return (parts @ block + block).permute(1, 2, 0, 3).reshape(weight.shape)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self._bat(weight) if self.config.init_weights == "bat" else self.delta()
        return weight + change, bias


CONFIG = MissConfig
GRAFT = Miss
