"""BOFT (arXiv:2311.06243): OFT whose rotation is a product of butterfly factors, and a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.methods._rotation import cayley, rotate, some_left_out


@dataclass(kw_only=True)
class BOFTConfig(LayerConfig):
    """s ⊙ W R, R a product of `boft_n_butterfly_factor` block rotations between permutations."""

    boft_block_size: int = 4
    boft_block_num: int = 0
    """Give either the size or the number of blocks, and 0 for the other."""
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    """The share of blocks that stay unrotated in training."""
    bias: str = "none"
    init_weights: bool = True
    """Start at no change; False: random."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "BOFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        a_share("boft_dropout", self.boft_dropout)
        one_of("bias", self.bias, ("none", "all", "boft_only"))
        at_least("boft_n_butterfly_factor", self.boft_n_butterfly_factor, 1)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError("give either boft_block_size or boft_block_num, and 0 for the other")


class Boft(Graft):
    KINDS = ("linear", "conv")
    config: BOFTConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, site = self.config, self.site
        inputs = site.inputs * math.prod(site.kernel)
        if site.groups > 1:
            raise ConfigError(f"BOFT does not go to {self.path}, a convolution in groups")
        given = config.boft_block_size or config.boft_block_num
        if inputs % given:
            raise ConfigError(f"BOFT: {given} does not divide the {inputs} inputs of {self.path}")
        self.size = config.boft_block_size or inputs // given
        self.count = inputs // self.size
        factors = config.boft_n_butterfly_factor
        if factors > 1 and (self.size % 2 or self.count % 2 ** (factors - 1)):
            raise ConfigError(
                f"boft_n_butterfly_factor={factors} needs blocks of an even size, and a number of "
                f"them that {2 ** (factors - 1)} divides; {self.path} has {self.count} of "
                f"{self.size}"
            )
        self.orders = [
            butterfly(inputs, self.count // 2**i, self.size // 2, factors > 1)
            for i in range(factors)
        ]

    def create(self) -> dict[str, Tensor | nn.Module]:
        factors, outputs = self.config.boft_n_butterfly_factor, self.site.outputs
        angles = self.empty(factors, self.count, self.size, self.size)
        scale = self.empty(*((1, outputs) if self.site.kind == "conv" else (outputs, 1)))
        if self.config.init_weights:
            angles.zero_()
            scale.fill_(1.0)
        else:
            angles.normal_(std=0.1)
            scale.normal_(mean=1.0, std=0.1)
        return {"boft_R": nn.Parameter(angles), "boft_s": nn.Parameter(scale)}

    def _rotated(self, x: Tensor, back: bool = False) -> Tensor:
        """x R, or (`back`) x Rᵀ."""
        free = self["boft_R"]
        skew = (free - free.transpose(-1, -2)).flatten(0, 1) / 2
        blocks = cayley(skew)
        training = self.layer.training and not back
        blocks = some_left_out(blocks, self.config.boft_dropout, training)
        blocks = blocks.view_as(free).to(x.dtype)
        factors = list(zip(self.orders, blocks))
        for order, block in factors if back else reversed(factors):
            order = order.to(x.device)
            x = x[..., order.argsort()]
            x = rotate(x, block.transpose(1, 2) if back else block)[..., order]
        return x

    def before(self, x: Tensor) -> Tensor:
        return x if self.site.kind == "conv" else self._rotated(x)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.site.kind == "conv":
            return super().after(x, y)
        scale = self.over(self["boft_s"], y)
        bias = getattr(self.base, "bias", None)
        return y * scale if bias is None else (y - bias) * scale + bias

    def delta(self) -> Tensor:
        return self.merged(self.weight, None)[0] - self.weight

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned = self._rotated(weight.flatten(1), back=True)
        return (turned * self["boft_s"].view(-1, 1)).view(weight.shape), bias


def butterfly(size: int, blocks: int, half: int, mixed: bool) -> Tensor:
    """The order of `size` inputs in which a butterfly factor's blocks lie side by side: within
    each of `blocks` groups, runs of `half` at even places first, then those at odd places."""
    if not mixed:
        return torch.arange(size)
    runs = torch.arange(size).view(blocks, -1, half)
    return torch.cat([runs[:, 0::2], runs[:, 1::2]], 1).flatten()


CONFIG = BOFTConfig
GRAFT = Boft
