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

from topwork.ops.dispatch import Op
from topwork.ops.dropout import drop, new_seed


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

    weight: Tensor
    bias: Tensor | None
    terms: tuple[LoraTerm, ...] = ()


def lora_linear(
    x: Tensor,
    weight: Tensor,
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
        y = F.linear(x, part.weight, part.bias)
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
    outputs = _FusedLinears.apply(flat, parts, rate, *matrices)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, parts: Sequence[LinearParts], rate: float, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        stacked = torch.cat([a.to(x.dtype) for a in matrices[0::2]])  # [R, in]
        seed = new_seed() if rate else 0
        low = (drop(x, rate, seed) if rate else x) @ stacked.t()  # [T, R]
        outputs, at = [], 0
        for part in parts:
            y = F.linear(x, part.weight, part.bias)
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
        at, index = 0, 0
        for part, dy in zip(ctx.parts, grads):
            for term in part.terms:
                r = term.a.shape[0]
                if dy is None:
                    db.append(None)
                else:
                    block = ups[:, at : at + r]
                    torch.mm(dy, bs[index].to(dy.dtype) * term.scale, out=block)
                    grad = dy.t() @ low[:, at : at + r]
                    db.append((grad.float() * term.scale).to(ctx.dtypes[2 * index + 1]))
                at, index = at + r, index + 1
            if dy is not None and ctx.needs_input_grad[0]:
                dx = dy @ part.weight if dx is None else dx.addmm_(dy, part.weight)
        seen = drop(x, ctx.rate, ctx.seed) if ctx.rate else x
        da_all = ups.t() @ seen  # [R, in]
        da = da_all.split([a.shape[0] for part in ctx.parts for a in (t.a for t in part.terms)])
        if dx is not None:
            if ctx.rate:
                drop(ups @ stacked, ctx.rate, ctx.seed, onto=dx)
            else:
                dx.addmm_(ups, stacked)
        pairs: list[Tensor | None] = []
        for i, (one_a, one_b) in enumerate(zip(da, db)):
            pairs += [one_a.to(ctx.dtypes[2 * i]), one_b]
        return dx, None, None, *pairs
