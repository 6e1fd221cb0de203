"""Linear layers with low-rank terms, as one autograd function (LoRA, arXiv:2106.09685).

    y = x Wᵀ + b + Σᵢ sᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ

The weight is frozen: no gradient is formed for it, `x` is saved once however many linears read
it, and the low-rank products are added in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op, apply
from topwork.ops.dropout import cut, drop, new_seed
from topwork.ops.native import lora as native
from topwork.ops.packed import Packed, at_hand, linear


@dataclass(frozen=True, slots=True)
class LoraTerm:
    """One low-rank term: `a` [r, in], `b` [out, r], its scale, and the dropout on its input."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class LinearParts:
    """What a linear layer computes: `weight` [out, in], `bias` [out] or None, low-rank terms."""

    weight: Tensor | Packed
    bias: Tensor | None
    terms: tuple[LoraTerm, ...] = ()


def lora_linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    terms: Sequence[LoraTerm],
    training: bool = False,
) -> Tensor:
    """`x` [..., in] → [..., out] through one linear with its low-rank terms."""
    return lora_linears(x, (LinearParts(weight, bias, tuple(terms)),), training)[0]


@Op
def lora_linears(
    x: Tensor, parts: Sequence[LinearParts], training: bool = False
) -> tuple[Tensor, ...]:
    """Several linears of the same `x` [..., in]; returns one [..., out] each."""
    outputs = []
    for part in parts:
        y = linear(x, part.weight, part.bias)
        for term in part.terms:
            seen = F.dropout(x, term.dropout, training)
            low = F.linear(seen, term.a.to(x.dtype))
            y = y + F.linear(low, term.b.to(x.dtype)) * term.scale
        outputs.append(y)
    return tuple(outputs)


def _is_frozen_with_terms(x: Tensor, parts: Sequence[LinearParts], training: bool = False) -> bool:
    terms = [term for part in parts for term in part.terms]
    if not terms or len({term.dropout for term in terms}) > 1:
        return False
    frozen = not any(
        part.weight.requires_grad or (part.bias is not None and part.bias.requires_grad)
        for part in parts
    )
    return frozen and all(part.weight.dtype == x.dtype for part in parts)


@lora_linears.variant("fused", when=_is_frozen_with_terms)
def fused_lora_linears(
    x: Tensor, parts: Sequence[LinearParts], training: bool = False
) -> tuple[Tensor, ...]:
    """One autograd function: stacked A, in-place sums, one dropout mask for the whole group."""
    terms = [term for part in parts for term in part.terms]
    rate = terms[0].dropout if training else 0.0
    matrices = [m for term in terms for m in (term.a, term.b)]
    flat = x.reshape(-1, x.shape[-1])
    outputs = apply(_FusedLinears, flat, parts, rate, *matrices)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, parts: Sequence[LinearParts], rate: float, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        stacked = torch.cat([a.to(x.dtype) for a in matrices[0::2]])  # [R, in]
        seed = new_seed() if rate else 0
        low = _down(x, stacked, rate, seed)  # [T, R]
        outputs, at = [], 0
        for part in parts:
            y = F.linear(x, at_hand(part.weight), part.bias)
            for term in part.terms:
                r = term.a.shape[0]
                y.addmm_(low[:, at : at + r], term.b.to(x.dtype).t(), alpha=term.scale)
                at += r
            outputs.append(y)
        ctx.save_for_backward(x, low, stacked, *matrices[1::2])
        ctx.parts, ctx.rate, ctx.seed = parts, rate, seed
        ctx.dtypes = [m.dtype for m in matrices]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, low, stacked, *bs = ctx.saved_tensors
        dx: Tensor | None = None
        ups = torch.zeros_like(low) if None in grads else torch.empty_like(low)  # [T, R]
        db: list[Tensor | None] = []
        at = 0
        for part, dy in zip(ctx.parts, grads):
            for term in part.terms:
                columns = slice(at, at + term.a.shape[0])
                at = columns.stop
                if dy is None:
                    db.append(None)
                    continue
                b = bs[len(db)]
                db.append(_up_grads(dy, low[:, columns], b, ups[:, columns], term.scale))
            if dy is not None and ctx.needs_input_grad[0]:
                weight = at_hand(part.weight)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        da_all = _down_grads(x, ups, stacked, dx, ctx.rate, ctx.seed)  # [R, in]
        da = da_all.split([term.a.shape[0] for part in ctx.parts for term in part.terms])
        pairs: list[Tensor | None] = []
        for i, (one_a, one_b) in enumerate(zip(da, db)):
            pairs.append(one_a.to(ctx.dtypes[2 * i]))
            pairs.append(None if one_b is None else one_b.to(ctx.dtypes[2 * i + 1]))
        return dx, None, None, *pairs


def _down(x: Tensor, stacked: Tensor, rate: float, seed: int) -> Tensor:
    """drop(x) Aᵀ: [T, in], [R, in] → [T, R]."""
    if native.serves(x, stacked):
        return native.down(x, stacked, seed, *cut(rate))
    return (drop(x, rate, seed) if rate else x) @ stacked.t()


def _up_grads(dy: Tensor, low: Tensor, b: Tensor, ups: Tensor, scale: float) -> Tensor:
    """Fills `ups` [T, r] with dy (scale · B); returns dB = scale · dyᵀ low, fp32."""
    if native.serves(dy, low):
        return native.up_grads(dy, low, b, ups, scale)
    torch.mm(dy, b.to(dy.dtype) * scale, out=ups)
    return (dy.t() @ low).float() * scale


def _down_grads(
    x: Tensor, ups: Tensor, stacked: Tensor, dx: Tensor | None, rate: float, seed: int
) -> Tensor:
    """Adds drop(ups A) to `dx`, if there is one; returns dA = upsᵀ drop(x)."""
    if native.serves(x, stacked):
        return native.down_grads(x, ups, stacked, dx, seed, *cut(rate))
    if dx is not None and rate:
        drop(ups @ stacked, rate, seed, onto=dx)
    elif dx is not None:
        dx.addmm_(ups, stacked)
    return ups.t() @ (drop(x, rate, seed) if rate else x)
