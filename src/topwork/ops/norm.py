"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topwork.ops.dispatch import Op, apply
from topwork.ops.native import elementwise as native

FEW = 2**15
"""Numbers up to which a pass costs less than calling it."""


@Op
def rms_norm(x: Tensor, weight: Tensor, eps: float, wide: bool = False) -> Tensor:
    """`weight` · x / √(mean(x²) + eps) over the last axis; computed in fp32, `x`'s dtype out.

    The quotient is rounded to `x`'s dtype before the weight multiplies it, or, if `wide`, after.
    """
    unit = x.float()
    unit = unit * torch.rsqrt(unit.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * unit).to(x.dtype) if wide else weight * unit.to(x.dtype)


def _frozen_weight(x: Tensor, weight: Tensor, eps: float, wide: bool = False) -> bool:
    return x.requires_grad and torch.is_grad_enabled() and not weight.requires_grad


@rms_norm.variant("recompute", when=_frozen_weight)
def recomputing_rms_norm(x: Tensor, weight: Tensor, eps: float, wide: bool = False) -> Tensor:
    """Saves `x` and one number per row; no gradient for the frozen weight."""
    return apply(_RmsNorm, x, weight, eps, wide)


def _few_rows(x: Tensor, weight: Tensor, eps: float, wide: bool = False) -> bool:
    if x.numel() > FEW or type(x) is not Tensor or (wide and x.dtype != torch.float32):
        return False
    graded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not graded and weight.dim() == 1 and native.serves(x, weight)


@rms_norm.variant("few rows", when=_few_rows)
def one_pass_rms_norm(x: Tensor, weight: Tensor, eps: float, wide: bool = False) -> Tensor:
    """A step of generation: one call in place of six, each of which costs more than it computes."""
    return native.rms_norm(x, weight, eps)[0]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, eps: float, wide: bool
    ) -> Tensor:
        if (not wide or x.dtype == torch.float32) and native.serves(x, weight):
            y, inverse = native.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, inverse)
            return y
        unit = x.float()
        inverse = torch.rsqrt(unit.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse.flatten())
        if wide:
            return (unit * inverse).mul_(weight).to(x.dtype)
        return (unit * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        if native.serves(dy, x, weight):
            return native.rms_norm_backward(dy, x, weight, inverse), None, None, None
        inverse = inverse.view(*x.shape[:-1], 1)
        unit = x.float().mul_(inverse)
        dunit = (dy * weight).float()
        along = (dunit * unit).mean(-1, keepdim=True)
        return dunit.addcmul_(unit, along, value=-1).mul_(inverse).to(x.dtype), None, None, None
