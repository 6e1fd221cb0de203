"""fp32 linears out of bf16 products on AMX tiles (`dense.c`)."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import call

ROWS = 64
"""With fewer, splitting the weight costs more than is won."""


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes `x` [..., C], `weight` [O, C] and `bias` [O]."""
    given = (x, weight) if bias is None else (x, weight, bias)
    dense = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
    whole = weight.is_contiguous() and weight.shape[0] % 32 == 0 and weight.shape[1] % 32 == 0
    return dense and whole and x.numel() >= ROWS * x.shape[-1] and has_amx()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x wᵀ + b, or gelu of it; [..., C] → [..., O]."""
    x = x.contiguous()
    out, width = weight.shape
    y = x.new_empty(*x.shape[:-1], out)
    given = weight if bias is None else bias
    sizes = (x.numel() // width, width, out, int(bias is not None), int(gelu))
    call("topwork_dense", x, weight, given, y, *sizes)
    return y
