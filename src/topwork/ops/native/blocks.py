"""Weights of 4 bits in flat blocks (`blocks.c`)."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.ops.native.build import call, library


def serves(count: int, block: int, *tensors: Tensor) -> bool:
    """Whether the kernels take `count` values in blocks of `block`."""
    dense = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return dense and block % 32 == 0 and count % block == 0 and library() is not None


def decode(codes: Tensor, factors: Tensor, levels: Tensor, out: Tensor, block: int) -> None:
    """Fills `out` bf16 with each code's level times its block's factor."""
    call("topwork_blocks4_decode", codes, factors, levels, out, out.numel(), block)


def encode(values: Tensor, edges: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The codes [n / 2] and factors [n / block] of `values` [n] fp32."""
    count = values.numel()
    codes = torch.empty(count // 2, dtype=torch.uint8)
    factors = torch.empty(count // block)
    call("topwork_blocks4_encode", values, edges, order, codes, factors, count, block)
    return codes, factors
