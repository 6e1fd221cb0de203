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
from topwork.ops.native import linear as tiled
from topwork.ops.native import lora as native
from topwork.ops.packed import Packed, at_hand, linear
from topwork.ops.recompute import about_to_keep


@dataclass(frozen=True, slots=True)
class LoraTerm:
    """One low-rank term: `a` [r, in], `b` [out, r], its scale, and the dropout on its input."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class LinearParts:
    """What a linear layer computes: `weight` [out, in], `bias` [out] or None, low-rank terms, and
    a `gain` [out], in front of the bias, on their sum."""

    weight: Tensor | Packed
    bias: Tensor | None
    terms: tuple[LoraTerm, ...] = ()
    gain: Tensor | None = None

    @property
    def inner_bias(self) -> Tensor | None:
        """The bias, where no gain stands before it."""
        return self.bias if self.gain is None else None


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
        y = linear(x, part.weight, part.inner_bias)
        for term in part.terms:
            seen = F.dropout(x, term.dropout, training)
            low = F.linear(seen, term.a.to(x.dtype))
            y = y + F.linear(low, term.b.to(x.dtype)) * term.scale
        outputs.append(_gained(y, part))
    return tuple(outputs)


def _is_frozen(x: Tensor, parts: Sequence[LinearParts], training: bool = False) -> bool:
    terms = [term for part in parts for term in part.terms]
    if len({term.dropout for term in terms}) > 1:
        return False
    if any(
        part.weight.requires_grad
        or part.weight.dtype != x.dtype
        or (part.bias is not None and part.bias.requires_grad)
        for part in parts
    ):
        return False
    return bool(terms) or (x.requires_grad and torch.is_grad_enabled() and _in_tiles(x, parts))


@lora_linears.variant("fused", when=_is_frozen)
def fused_lora_linears(
    x: Tensor, parts: Sequence[LinearParts], training: bool = False
) -> tuple[Tensor, ...]:
    """One autograd function: stacked A, in-place sums, one dropout mask for the whole group."""
    terms = [term for part in parts for term in part.terms]
    rate = terms[0].dropout if training and terms else 0.0
    matrices = [m for term in terms for m in (term.a, term.b)]
    gains = [part.gain for part in parts if part.gain is not None]
    flat = x.reshape(-1, x.shape[-1])
    outputs = apply(_FusedLinears, flat, parts, rate, len(gains), *gains, *matrices)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, parts: Sequence[LinearParts], rate: float, gained: int, *more: Tensor
    ) -> tuple[Tensor, ...]:
        matrices = more[gained:]
        seed = new_seed() if rate else 0
        stacked = low = None
        if matrices:
            stacked = torch.cat([a.to(x.dtype) for a in matrices[0::2]])  # [R, in]
            low = _down(x, stacked, rate, seed)  # [T, R]
        if not gained:
            about_to_keep(None if low is None else x, low, stacked, *matrices[1::2])
        ctx.tiles = _in_tiles(x, parts)
        one = _tiled_output if ctx.tiles else _output
        sums, at = [], 0
        for part in parts:
            sums.append(one(x, part, low, at))
            at += sum(term.a.shape[0] for term in part.terms)
        outputs = [_gained(y, part) for y, part in zip(sums, parts)]
        kept = [y for y, part in zip(sums, parts) if part.gain is not None]
        ctx.save_for_backward(
            None if low is None else x, low, stacked, *more[:gained], *kept, *matrices[1::2]
        )
        ctx.gained = gained
        ctx.parts, ctx.rate, ctx.seed = parts, rate, seed
        ctx.dtypes = [m.dtype for m in matrices]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, low, stacked, *rest = ctx.saved_tensors
        n = ctx.gained
        gains, sums, bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
        inner, dgains = _through_gains(ctx.parts, grads, gains, sums)
        ups: Tensor | None = None  # [T, R]
        if low is not None:
            whole = all(dy is not None for dy in inner)
            ups = torch.empty_like(low) if whole else torch.zeros_like(low)
        db: list[Tensor | None] = []
        at = 0
        for part, dy in zip(ctx.parts, inner):
            for term in part.terms:
                assert low is not None
                assert ups is not None
                columns = slice(at, at + term.a.shape[0])
                at = columns.stop
                b = bs[len(db)]
                db.append(
                    None
                    if dy is None
                    else _up_grads(dy, low[:, columns], b, ups[:, columns], term.scale)
                )
        dx, within = None, ctx.tiles and not ctx.rate
        dense = [(dy, part.weight) for dy, part in zip(inner, ctx.parts) if dy is not None]
        if dense and ctx.needs_input_grad[0] and ctx.tiles:
            dx = _input_grad(dense, ups if within else None, stacked)
        elif ctx.needs_input_grad[0]:
            for dy, weight in dense:
                dx = dy @ at_hand(weight) if dx is None else dx.addmm_(dy, at_hand(weight))
        pairs: list[Tensor | None] = []
        if ups is not None:
            da = _down_grads(x, ups, stacked, None if within else dx, ctx.rate, ctx.seed)  # [R, in]
            ranks = [term.a.shape[0] for part in ctx.parts for term in part.terms]
            for i, (one_a, one_b) in enumerate(zip(da.split(ranks), db)):
                pairs.append(one_a.to(ctx.dtypes[2 * i]))
                pairs.append(None if one_b is None else one_b.to(ctx.dtypes[2 * i + 1]))
        return dx, None, None, None, *dgains, *pairs


def _gained(y: Tensor, part: LinearParts) -> Tensor:
    """A linear's sum `y` [..., out] with its gain and the bias behind it, if there is one."""
    if part.gain is None:
        return y
    gain = part.gain.to(y.dtype)
    return y * gain if part.bias is None else torch.addcmul(part.bias, y, gain)


def _through_gains(
    parts: Sequence[LinearParts],
    grads: Sequence[Tensor | None],
    gains: list[Tensor],
    sums: list[Tensor],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of the sums from those of the outputs, and the gains' own."""
    inner: list[Tensor | None] = []
    own: list[Tensor | None] = []
    for part, dy in zip(parts, grads):
        if part.gain is None or dy is None:
            inner.append(dy)
            own += [None] * (part.gain is not None)
            continue
        gain, y = gains[len(own)], sums[len(own)]
        if gain.dtype == torch.float32 and native.serves_wide(dy) and native.serves_wide(y):
            dy, dgain = native.gained(dy, y, gain)
        else:
            dgain = (dy * y).sum(0, dtype=torch.float32).to(gain.dtype)
            dy = dy * gain.to(dy.dtype)
        inner.append(dy)
        own.append(dgain)
    return inner, own


def _in_tiles(x: Tensor, parts: Sequence[LinearParts]) -> bool:
    """Whether the kernel serves these linears of `x` [..., in]."""
    if x.device.type != "cpu":
        return False
    weights = [part.weight for part in parts]
    shapes = [(w.shape, w.dtype) for w in weights]
    dense = all(not isinstance(w, Tensor) or w.is_contiguous() for w in weights)
    return dense and tiled.serves(x.numel() // x.shape[-1], x.dtype, shapes)


def _output(x: Tensor, part: LinearParts, low: Tensor | None, at: int) -> Tensor:
    """One linear's output; its terms begin at column `at` of `low` [T, R]."""
    y = F.linear(x, at_hand(part.weight), part.inner_bias)
    for term in part.terms:
        assert low is not None
        r = term.a.shape[0]
        y.addmm_(low[:, at : at + r], term.b.to(x.dtype).t(), alpha=term.scale)
        at += r
    return y


def _tiled_output(x: Tensor, part: LinearParts, low: Tensor | None, at: int) -> Tensor:
    """The same, the terms within the product."""
    pieces = [tiled.Part(x.contiguous(), at_hand(part.weight))]
    for term in part.terms:
        assert low is not None
        r = term.a.shape[0]
        b = term.b.detach().float().contiguous()
        pieces.append(tiled.Part(low[:, at : at + r], b, term.scale))
        at += r
    return tiled.product(pieces, part.inner_bias)


def _input_grad(
    dense: list[tuple[Tensor, Tensor | Packed]], ups: Tensor | None, stacked: Tensor | None
) -> Tensor | None:
    """Σ dy W (+ ups A): what the linears' gradients dy [T, out] make of their input's, in tiles."""
    rows = [(dy if dy.stride(1) == 1 else dy.contiguous(), weight) for dy, weight in dense]
    low = [] if ups is None or stacked is None else [tiled.Part(ups, stacked)]
    if any(isinstance(weight, Packed) for _, weight in rows):  # all are made in one place
        dx: Tensor | None = None
        for dy, weight in rows:
            dx = tiled.turned_product([tiled.Part(dy, at_hand(weight)), *low], dx)
            low = []
        return dx
    return tiled.turned_product([*(tiled.Part(dy, at_hand(w)) for dy, w in rows), *low])


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
