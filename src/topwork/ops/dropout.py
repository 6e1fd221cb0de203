"""Dropout that can be drawn again: the mask is a function of a seed, so none is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topwork.ops.dispatch import apply
from topwork.ops.native import elementwise as native


def new_seed() -> int:
    """A fresh seed from torch's default generator (so that a resumed run draws the same)."""
    return int(torch.randint(0, 2**62, ()).item())


def cut(rate: float) -> tuple[int, float]:
    """Below which 16-bit number an element is dropped, and what the others are multiplied by."""
    return round(rate * 65536), 1.0 / (1.0 - rate)


def drop(x: Tensor, rate: float, seed: int, onto: Tensor | None = None) -> Tensor:
    """`x` with elements zeroed with probability `rate` and the others scaled by 1/(1-rate).

    With `onto`, that is added to it in place. Each element has sixteen bits that are a hash of
    its index and the seed: the same on every device, with any number of threads.
    """
    threshold, scale = cut(rate)
    if native.serves(x, *(() if onto is None else (onto,))):
        return native.drop(x, seed, threshold, scale, onto)
    kept = x * (random_bits(x.numel(), seed, x.device).view(x.shape) >= threshold) * scale
    return kept if onto is None else onto.add_(kept)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: int) -> Tensor:  # type: ignore[override]
        ctx.rate, ctx.seed = rate, seed
        return drop(x, rate, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return drop(grad.contiguous(), ctx.rate, ctx.seed), None, None


def dropped(x: Tensor, rate: float, seed: int) -> Tensor:
    """`drop` with a gradient: the backward pass draws the same mask again and saves nothing."""
    return apply(_Dropped, x, rate, seed)


def random_bits(count: int, seed: int, device: torch.device) -> Tensor:
    """Sixteen bits for each of `count` elements, as int32: two from every hashed counter."""
    h = torch.arange((count + 1) // 2, dtype=torch.int32, device=device)
    h.mul_(_signed(0x9E3779B1)).add_(_signed(seed))
    h.bitwise_xor_((h >> 16) & 0xFFFF).mul_(_signed(0x85EBCA6B)).bitwise_xor_(_signed(seed >> 32))
    h.bitwise_xor_((h >> 13) & 0x7FFFF).mul_(_signed(0xC2B2AE35))
    h.bitwise_xor_((h >> 16) & 0xFFFF)
    return torch.stack((h & 0xFFFF, (h >> 16) & 0xFFFF), -1).view(-1)[:count]


def _signed(word: int) -> int:
    """The low 32 bits as a signed number."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)
