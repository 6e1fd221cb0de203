"""A linear of whose weight some entries are changed, as one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.peft import sites


def changed_linear(base: Any, x: Tensor, places: Tensor, values: Tensor) -> Tensor | None:
    """`x` through `base` with `values` added at flat `places` of its weight, which is made again
    in the backward pass rather than kept; None where `base` is no plain linear."""
    parts = sites.linear_parts(base)
    if parts is None or parts.terms or not isinstance(parts.weight, Tensor):
        return None
    return _Changed.apply(x, parts.weight, parts.bias, places, values)


class _Changed(torch.autograd.Function):
    """x (W + Δ)ᵀ + b, the Δ of `values` at flat `places` of W. Only Δ and x have gradients."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, places, values)
        return F.linear(x, changed(weight, places, values), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, places, values = ctx.saved_tensors
        dx = dy @ changed(weight, places, values) if ctx.needs_input_grad[0] else None
        whole = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        bias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, bias, None, whole.flatten()[places].to(values.dtype)


def changed(weight: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """`weight` with `values` added at flat `places`."""
    flat = weight.detach().flatten().scatter_add(0, places, values.to(weight.dtype))
    return flat.view(weight.shape)
