"""Products with frozen weights and low-rank terms, bf16 on AMX tiles (`linear.c`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import call

FEWEST = 64
"""Rows below which packing a weight costs too much of its product."""
WIDEST = 16384
"""The longest inner dimension, all parts together: a strip of the panel holds it."""


class Part(NamedTuple):
    """One product of a sum: `rows` [T, K] (columns of a matrix, maybe) with a `weight`, bf16 or,
    times `scale`, fp32."""

    rows: Tensor
    weight: Tensor
    scale: float = 1.0


class _Part(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("lda", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("wide", ctypes.c_int32),
    ]


def serves(
    rows: int, dtype: torch.dtype, weights: Sequence[tuple[torch.Size, torch.dtype]]
) -> bool:
    """Whether the kernel takes `rows` of `dtype` and weights of these shapes [out, in]."""
    return (
        rows >= FEWEST
        and dtype == torch.bfloat16
        and all(d == dtype and n % 32 == 0 and k % 32 == 0 for (n, k), d in weights)
        and sum(max(shape) for shape, _ in weights) <= WIDEST
        and has_amx()
    )


def product(parts: Sequence[Part], bias: Tensor | None = None) -> Tensor:
    """Σ rows weightᵀ + bias: weights [N, K] → [T, N]."""
    y = parts[0].rows.new_empty(len(parts[0].rows), len(parts[0].weight))
    return _run(parts, y, bias, turned=False, add=False)


def turned_product(parts: Sequence[Part], onto: Tensor | None = None) -> Tensor:
    """Σ rows weight: bf16 weights [K, N] → [T, N]; added to `onto`, if there is one."""
    y = onto
    if y is None:
        y = parts[0].rows.new_empty(len(parts[0].rows), parts[0].weight.shape[1])
    return _run(parts, y, None, turned=True, add=onto is not None)


def _run(parts: Sequence[Part], y: Tensor, bias: Tensor | None, turned: bool, add: bool) -> Tensor:
    told = (_Part * len(parts))(*(
        (p.rows.data_ptr(), p.weight.data_ptr(), p.rows.stride(0), p.rows.shape[1], p.scale,
         p.weight.dtype == torch.float32) for p in parts
    ))  # fmt: skip
    call("topwork_linear", told, len(parts), y, bias, *y.shape, int(turned), int(add))
    return y
