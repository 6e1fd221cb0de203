"""OFT (arXiv:2306.07280, arXiv:2506.19847): the layer's inputs are rotated block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.methods._rotation import cayley, rotate, some_left_out
from topwork.peft.tensors import Matrix


@dataclass(kw_only=True)
class OFTConfig(LayerConfig):
    """W R with R block-diagonal and orthogonal: the Cayley form of a skew-symmetric matrix."""

    r: int = 0
    """The number of blocks; or give the blocks' size."""
    oft_block_size: int = 32
    module_dropout: float = 0.0
    """The share of blocks that stay unrotated in training."""
    bias: str = "none"
    init_weights: bool = True
    """Start at no rotation; False: random."""
    coft: bool = False
    """Keep the rotation within `eps`."""
    eps: float = 6e-5
    block_share: bool = False
    """One rotation for all blocks."""
    use_cayley_neumann: bool = True
    """Approximate the inverse by a Neumann series."""
    num_cayley_neumann_terms: int = 5
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "OFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        a_share("module_dropout", self.module_dropout)
        one_of("bias", self.bias, ("none", "all", "oft_only"))
        at_least("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 1)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"r={self.r} and oft_block_size={self.oft_block_size}: give one and 0 for the other"
            )


class Oft(Graft):
    config: OFTConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        inputs = self.site.inputs
        if self.config.r:
            self.count = nearest_divisor(inputs, self.config.r)
            self.size = inputs // self.count
        else:
            self.size = nearest_divisor(inputs, self.config.oft_block_size)
            self.count = inputs // self.size

    def create(self) -> dict[str, Tensor | nn.Module]:
        own = 1 if self.config.block_share else self.count
        angles = self.empty(own, self.size * (self.size - 1) // 2)
        angles = angles.zero_() if self.config.init_weights else angles.normal_(std=0.1)
        return {"oft_R": Matrix(angles)}

    def _skew(self, angles: Tensor) -> Tensor:
        row, column = torch.triu_indices(self.size, self.size, 1, device=angles.device)
        upper = angles.new_zeros(angles.shape[0], self.size, self.size)
        upper[:, row, column] = angles
        return upper - upper.transpose(1, 2)

    def _blocks(self) -> Tensor:
        angles = self["oft_R"]
        if self.config.coft:
            with torch.no_grad():
                norm = self._skew(angles).norm(dim=(1, 2)).unsqueeze(1)
                most = self.config.eps / angles.shape[0] ** 0.5
                inside = norm <= most * (1 + 1e-6)
                self.parameter("oft_R").copy_(torch.where(inside, angles, angles * (most / norm)))
            angles = self["oft_R"]
        skew = self._skew(angles)
        return self._series(skew) if self.config.use_cayley_neumann else cayley(skew)

    def _series(self, skew: Tensor) -> Tensor:
        """I + 2S + 2S² + … + Sⁿ, n = terms - 1 (of three terms: 3), for (I + S)(I - S)⁻¹."""
        total = torch.eye(self.size, device=skew.device, dtype=skew.dtype).expand_as(skew)
        terms, power = self.config.num_cayley_neumann_terms, skew
        if terms == 2:
            return total + 2 * skew
        terms = 4 if terms == 3 else terms
        for at in range(1, terms):
            total = total + (power if at == terms - 1 else 2 * power)
            power = power @ skew
        return total

    def before(self, x: Tensor) -> Tensor:
        blocks = self._blocks()
        blocks = some_left_out(blocks, self.config.module_dropout, self.layer.training)
        return rotate(x, blocks.to(x.dtype))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return rotate(weight, self._blocks().transpose(1, 2)), bias


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller of two."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


CONFIG = OFTConfig
GRAFT = Oft
