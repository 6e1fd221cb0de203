"""Linears of a few rows, whose time is that of reading the weights (`few.c`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import library

ROWS = 16
"""With more, torch's products are as fast."""
UNTILED = 4
"""The same in bf16 where no tiles are there, or the weight does not fill them."""


class _Part(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("weight", "bias", "y")] + [("out", ctypes.c_int64)]


@functools.cache
def _kernel() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    run = getattr(library(), "topwork_few", None)
    if run is not None:
        run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 5]
        run.restype = None
    return run


def _rows(dtype: torch.dtype, weight: Tensor) -> int:
    out, width = weight.shape
    tiled = dtype is torch.float32 or (width % 32 == 0 and out % 16 == 0 and has_amx())
    return ROWS if tiled else UNTILED


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes `x` [..., C], `weight` [O, C] and `bias` [O]."""
    dtype = x.dtype
    return (
        (dtype is torch.float32 or dtype is torch.bfloat16)
        and 0 < x.numel() <= _rows(dtype, weight) * x.shape[-1]
        and weight.dtype is dtype
        and (bias is None or (bias.dtype is dtype and bias.is_contiguous()))
        and weight.is_contiguous()
        and x.device.type == weight.device.type == "cpu"
        and _kernel() is not None
    )


class Linears:
    """Weights [O, C] and biases [O] or None that read one x, written down for the kernel."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self.parts = parts
        self._made = (_Part * len(parts))()
        for one, (weight, bias) in zip(self._made, parts):
            one.weight, one.out = weight.data_ptr(), weight.shape[0]
            one.bias = None if bias is None else bias.data_ptr()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x wᵀ + b, [..., C] → [..., O], for each."""
        x = x.contiguous()
        *rows, width = x.shape
        found = tuple(x.new_empty(*rows, one.out) for one in self._made)
        for one, y in zip(self._made, found):
            one.y = y.data_ptr()
        run = _kernel()
        assert run is not None
        run(
            ctypes.addressof(self._made), len(found), x.data_ptr(), x.numel() // width, width,
            x.dtype is torch.bfloat16, has_amx(), torch.get_num_threads(),
        )  # fmt: skip
        return found


def linears(x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
    """x wᵀ + b, [..., C] → [..., O], for each (w, b)."""
    return Linears(parts)(x)
