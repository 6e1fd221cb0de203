"""What DoRA (arXiv:2402.09353) adds to a low-rank term: the norms of the rows of W + s · B A."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.ops.dispatch import Op
from topwork.ops.native import lora as native


@Op
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, own: Tensor) -> Tensor:
    """‖W + s · B A‖ [out] of each row, without forming the sum or a gradient:
    ‖W‖² + 2s · ⟨B, W Aᵀ⟩ + s² · ⟨B, B A Aᵀ⟩, of which the first is given.

    `weight` [out, in], `a` [r, in], `b` [out, r] fp32, `own` = ‖W‖² [out] fp32.
    """
    cross = (weight @ a.t().to(weight.dtype)).float()
    squared = own + 2 * scale * (b * cross).sum(1)
    squared += scale**2 * (b @ (a @ a.t()) * b).sum(1)
    return squared.clamp_(min=0).sqrt_()


def _in_tiles(weight: Tensor, a: Tensor, b: Tensor, scale: float, own: Tensor) -> bool:
    plain = type(weight) is Tensor or type(weight) is torch.nn.Parameter
    thin = torch.float32 == a.dtype == b.dtype == own.dtype and len(a) <= native.WIDEST
    return plain and thin and native.serves_wide(weight)


@row_norms.variant("tiles", when=_in_tiles)
def tiled_row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, own: Tensor) -> Tensor:
    """W is read once, in tiles, and all else done in one call."""
    cross = native.down(weight, a.to(weight.dtype), 0, 0, 1.0)
    return native.row_norms(cross, b.contiguous(), a @ a.t(), own, scale)
