"""Attention of packed documents in bf16 on AMX tiles (`attention.c`)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from topwork.ops.dispatch import apply
from topwork.ops.native.build import call, library

STEP = 32  # rows to which a document is padded inside the kernel


class _Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in
                ("docs", "heads", "kv_heads", "head", "ldq", "ldk", "ldv", "causal", "window")
                ] + [("scale", ctypes.c_float)]  # fmt: skip


@functools.cache
def has_amx() -> bool:
    """Whether the processor, the system and the compiler give bf16 tiles."""
    found = library()
    return found is not None and bool(found.topwork_amx())


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Each document of `lengths` attends to itself: q [T, H, D], k, v [T, K, D] → [T, H, D].

    bf16 on a CPU with AMX; D a multiple of 32.
    """
    return apply(_Packed, q, k, v, lengths, scale, causal, window)


def _rows(x: Tensor) -> Tensor:
    """`x` [T, heads, D] with its heads side by side (rows may lie apart)."""
    whole = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if whole else x.contiguous()


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        tokens, heads, head = q.shape
        starts = torch.tensor([0, *lengths]).cumsum(0)
        shape = _Call(
            len(lengths), heads, k.shape[1], head, q.stride(0), k.stride(0), v.stride(0),
            causal, window or 0, scale,
        )  # fmt: skip
        out = torch.empty(tokens, heads, head, dtype=q.dtype)
        lse = torch.empty(heads, tokens)
        packs = torch.empty(2 * (tokens + STEP * len(lengths)) * k.shape[1] * head, dtype=q.dtype)
        call("topwork_attention_forward", shape, starts, q, k, v, out, lse, packs)
        ctx.save_for_backward(starts, q, k, v, out, lse)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        starts, q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        found = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
        saved = (starts, q, k, v, out, lse)
        call("topwork_attention_backward", ctx.shape, *saved, grad, *found)
        return (*found, None, None, None, None)
