"""A linear whose frozen weight is made when it is needed, and held no longer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op, apply


@dataclass(frozen=True, slots=True)
class Packed:
    """A frozen weight [out, in] in few bits. `fill` writes it into a tensor of that shape."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    fill: Callable[[Tensor], Tensor]
    requires_grad: bool = False

    def dense(self) -> Tensor:
        """The weight as a new tensor."""
        return self.fill(torch.empty(self.shape, dtype=self.dtype, device=self.device))


class _Scratch(threading.local):
    """One buffer per thread, dtype and device, as large as the largest weight so far."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, weight: Packed) -> Tensor:
        key, count = (weight.dtype, weight.device), weight.shape.numel()
        found = self.held.get(key)
        if found is None or found.numel() < count:
            with torch.inference_mode(False):
                found = torch.empty(count, dtype=weight.dtype, device=weight.device)
            self.held[key] = found
        return found[:count].view(weight.shape)


_scratch = _Scratch()


def at_hand(weight: Tensor | Packed) -> Tensor:
    """The weight to be used at once: the next call may write over it. Never save it."""
    if isinstance(weight, Tensor):
        return weight
    with torch.no_grad():
        return weight.fill(_scratch.like(weight))


@Op
def linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b: [..., in] → [..., out]."""
    dense = weight if isinstance(weight, Tensor) else weight.dense()
    return F.linear(x, dense, bias)


def _is_packed(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> bool:
    return isinstance(weight, Packed)


@linear.variant("packed", when=_is_packed)
def packed_linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """The weight is made once forward and once backward, into the same buffer; `x` is not kept."""
    if bias is not None and bias.requires_grad:
        return apply(_PackedLinear, x, weight, None) + bias
    return apply(_PackedLinear, x, weight, bias)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Packed, bias: Tensor | None
    ) -> Tensor:
        ctx.weight = weight
        return F.linear(x, at_hand(weight), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dy @ at_hand(ctx.weight), None, None
