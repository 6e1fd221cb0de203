"""Rotary position embedding, the "rotate half" layout (arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topwork.ops.dispatch import Op


@Op
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` [B, T, H, D] by the angles whose `cos` and `sin` [B, T, D/2] are given."""
    first, second = x.chunk(2, dim=-1)
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B, T, 1, D/2]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


@rotary.variant("recompute", when=lambda x, cos, sin: torch.is_grad_enabled() and x.requires_grad)
def linear_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation's gradient is the opposite rotation: nothing of `x` is saved."""
    return _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return rotary.reference(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return rotary.reference(dy, cos, -sin), None, None
