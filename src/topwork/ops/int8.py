"""LLM.int8 (arXiv:2208.07339): rows of activations in 8 bits times rows of weights in 8 bits, and
the few columns with large activations beside them in the activations' own precision.

Roundings are those of bitsandbytes, so outputs are too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topwork.ops.dispatch import Op, apply

EXACT = 1024  # products of two codes that fp32 adds up without rounding
BOTH = 6.200124e-05  # 1/127², as bitsandbytes has it
ONE = 0.007874015718698502  # 1/127


def encode_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] int8 and each row's largest absolute value [out] fp32 of `weight`, which is
    rounded to fp16 first."""
    half = weight.to(torch.float16)
    most = half.abs().amax(1).float()
    return _codes(half, most), most


def decode_rows(codes: Tensor, most: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [out, in] with the weight."""
    return out.copy_(codes).mul_(most[:, None] * (1.0 / 127.0))


def _codes(rows: Tensor, most: Tensor) -> Tensor:
    scale = torch.where(most == 0, 0.0, 127.0 / most)[:, None]
    return torch.round(rows * scale).to(torch.int8)


@Op
def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ, exact: codes [N, in] and [out, in] int8 → [N, out] int32."""
    parts = zip(a.split(EXACT, 1), b.split(EXACT, 1))
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for left, right in parts:
        total += (left.float() @ right.float().t()).to(torch.int32)
    return total


def _has_instructions(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return a.is_cuda and len(a) > 16 and a.shape[1] % 8 == 0 and len(b) % 8 == 0


@int8_product.variant("integers", when=_has_instructions)
def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """With the processor's own 8-bit products."""
    return torch._int_mm(a, b.t())  # type: ignore[attr-defined]


def int8_linear(
    x: Tensor, codes: Tensor, most: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """x Wᵀ + b: [..., in] → [..., out], with W as `encode_rows` gives it.

    Columns of x in which a value reaches `threshold` (0: none) are outliers. The gradient is that
    of the decoded weight with x as it is.
    """
    return apply(_Int8Linear, x, codes, most, bias, threshold)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, codes: Tensor, most: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        ctx.save_for_backward(codes, most)
        rows = x.reshape(-1, x.shape[-1])
        half = rows.to(torch.float16)
        large = half.abs() >= threshold if threshold > 0 else None
        if large is None:
            highest = half.abs().amax(1).float()
            taken = _codes(half, highest)
        else:
            half = half.masked_fill(large, 0)
            highest = half.abs().amax(1).float()
            taken = _codes(half, highest).masked_fill(large.any(0), 0)
        y = int8_product(taken, codes) * (highest[:, None] * most[None]) * BOTH
        if bias is not None:
            y += bias
        y = y.to(x.dtype)
        if large is not None:
            y = _with_outliers(y, rows, large.any(0), codes, most)
        return y.view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, most = ctx.saved_tensors
        weight = decode_rows(
            codes, most, torch.empty(codes.shape, dtype=dy.dtype, device=dy.device)
        )
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return dy @ weight, None, None, db, None


def _with_outliers(
    y: Tensor, rows: Tensor, outliers: Tensor, codes: Tensor, most: Tensor
) -> Tensor:
    """`y` and the products of the columns `outliers` [in] in the precision of `rows`."""
    if torch.compiler.is_compiling():  # a graph does not know how many they are
        rows = rows.masked_fill(~outliers, 0)
    else:
        columns = outliers.nonzero().flatten()
        rows, codes = rows[:, columns], codes[:, columns]
    return y.addmm(rows, (codes * most[:, None] * ONE).to(y.dtype).t())
