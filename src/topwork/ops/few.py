"""Linears of a few rows without gradient: a step of generation, whose time is reading weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from topwork.ops.lora import LinearParts, lora_linears
from topwork.ops.native import few
from topwork.ops.packed import Packed

LEAST = 2**16
"""Numbers in a weight; a smaller one is read before a call of the kernel has begun."""
_PLAIN = (Tensor, nn.Parameter)


def _serves(x: Tensor, parts: Sequence[LinearParts], training: bool = False) -> bool:
    if type(x) is not Tensor or x.numel() > few.ROWS * x.shape[-1]:
        return False
    graded = torch.is_grad_enabled()
    for part in parts:
        weight = part.weight
        if part.terms or isinstance(weight, Packed) or type(weight) not in _PLAIN:
            return False
        if graded and (x.requires_grad or weight.requires_grad):
            return False
        if weight.numel() < LEAST or not few.serves(x, weight, part.bias):
            return False
    return not torch.is_autocast_enabled("cpu")


@lora_linears.variant("few rows", when=_serves)
def few_linears(
    x: Tensor, parts: Sequence[LinearParts], training: bool = False
) -> tuple[Tensor, ...]:
    """Each weight is read once, however many rows there are, and ahead of its use."""
    return few.linears(x, [(part.weight, part.bias) for part in parts])  # type: ignore[misc]
