"""Rotary position embedding (arXiv:2104.09864), by halves or by neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topwork.ops.dispatch import Op, apply
from topwork.ops.native import elementwise as native


@Op
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first R dimensions of `x` [B, T, H, D] by angles given as cos, sin [B, T, R/2].

    Dimension i turns with i + R/2, or, if `interleaved`, 2i with 2i + 1; those from R on stay.
    With fp32 tables the turn is computed in fp32.
    """
    width = 2 * cos.shape[-1]
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B, T, 1, R/2]
    turning = x[..., :width]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((first * c - second * s, second * c + first * s), -1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    turned = turned.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def _wants_grad(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


@rotary.variant("recompute", when=_wants_grad)
def linear_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """A rotation's gradient is the opposite rotation: nothing of `x` is saved."""
    return apply(_Rotary, x, cos, sin, interleaved)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, back=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, ctx.interleaved, back=True), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    if native.serves(x, cos, sin) and x.dim() == 4 and cos.shape[:2] == x.shape[:2]:
        return native.rotary(x, cos, sin, interleaved, back)
    return rotary.reference(x, cos, -sin if back else sin, interleaved)
