"""Attention over packed documents, padded rows or a cache.

Letters: B batch, T queries, S keys, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op
from topwork.ops.dropout import dropped, new_seed
from topwork.ops.native.attention import has_amx, packed_attention
from topwork.ops.recompute import recomputed

Lengths = tuple[int | tuple[int, ...], ...]


@dataclass(frozen=True)
class Unshared:
    """Branched documents with each beginning repeated: `lengths` of the plain documents, the rows
    to `take` for them, and where each row comes `back` from."""

    lengths: tuple[int, ...]
    take: Tensor
    back: Tensor


def is_branched(lengths: Lengths | None) -> bool:
    """Whether documents share beginnings."""
    return lengths is not None and any(isinstance(n, tuple) for n in lengths)


@lru_cache(maxsize=8)
def unshared(lengths: Lengths, device: torch.device) -> Unshared:
    """How branched documents become plain ones and back; a beginning comes from its first copy."""
    sizes: list[int] = []
    take: list[range] = []
    back: list[range] = []
    at = out = 0
    for entry in lengths:
        first, *branches = entry if isinstance(entry, tuple) else (0, entry)
        begin = range(at, at + first)
        back.append(range(out, out + first))
        at += first
        for size in branches:
            take += [begin, range(at, at + size)]
            back.append(range(out + first, out + first + size))
            sizes.append(first + size)
            at, out = at + size, out + first + size
    rows, places = (torch.tensor([i for r in part for i in r]) for part in (take, back))
    return Unshared(tuple(sizes), rows.to(device), places.to(device))


@dataclass(frozen=True)
class Blocks:
    """Tokens that see each other whatever their order: those of one number ≥ 0 in `ids` [B, S].

    `windowed`: a window hides them from each other like all others; else it does not.
    """

    ids: Tensor
    windowed: bool = False

    def part(self, index: Any) -> Blocks:
        """Those at `index` of `ids`."""
        return Blocks(self.ids[index], self.windowed)


@dataclass(frozen=True)
class Layout:
    """Where the rows' tokens lie.

    `lengths`: the documents that lie one after the other in a single row (then B is 1 and there is
    no cache); (P, n, m …) stands for a shared beginning of P tokens and its branches, each of which
    goes on from the beginning and does not see the others. Otherwise `past` keys stand before the
    first query, and `keep` [B, S] is False where a key is padding (None: no padding). `blocks`:
    which tokens look ahead too.
    """

    lengths: Lengths | None = None
    past: int = 0
    keep: Tensor | None = None
    blocks: Blocks | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        sizes = [n[0] + max(n[1:]) if isinstance(n, tuple) else n for n in self.lengths or ()]
        return max(sizes, default=0)

    @property
    def documents(self) -> tuple[int, ...]:
        """`lengths` where no document is branched."""
        assert self.lengths is not None
        assert not is_branched(self.lengths)
        return self.lengths  # type: ignore[return-value]

    def tail(self, queries: int, keys: int) -> Layout:
        """The same, where a cache has kept only the last `keys` keys."""
        gone = self.past + queries - keys
        if gone <= 0 or self.lengths is not None:
            return self
        keep = None if self.keep is None else self.keep[:, gone:]
        blocks = None if self.blocks is None else self.blocks.part((slice(None), slice(gone, None)))
        return Layout(None, self.past - gone, keep, blocks)


@dataclass(frozen=True)
class Rule:
    """How scores are formed and which keys a query at position p may see.

    `causal`: the keys up to p, else all; `window`: only keys nearer than `window` to p (on the
    far side too when not causal); `chunk`: only keys of p's own chunk of so many positions.
    `softcap`: scores s become softcap · tanh(s / softcap) before masking. `dropout`: how many of
    the probabilities are dropped, the others growing for it; 0 but in training.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def sees_all(self, keys: int) -> bool:
        """Whether neither window nor chunk hides anything among `keys` keys."""
        return (self.window is None or self.window >= keys) and (
            self.chunk is None or self.chunk >= keys
        )


@dataclass(frozen=True)
class ScoreTerms:
    """What is added to the scores, all per head.

    `slopes` [H]: ALiBi, slope · (key position - query position) (arXiv:2108.12409). `bias`
    [H, ≥T, ≥S]: by the positions of query and key. `sinks` [H]: a further score that takes part
    in the softmax and whose weight is dropped (gpt-oss).
    """

    slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None


NO_TERMS = ScoreTerms()


def visible(layout: Layout, queries: int, keys: int, rule: Rule, device: torch.device) -> Tensor:
    """The boolean mask [B or 1, 1, T, S]: True where the query may see the key."""
    q = torch.arange(layout.past, layout.past + queries, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    mask = k <= q if rule.causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    ahead = None if layout.blocks is None else _same_block(layout, layout.blocks, queries, keys)
    if ahead is not None and layout.blocks is not None and layout.blocks.windowed:
        mask = mask | ahead
    if layout.lengths is not None:
        sizes = torch.tensor(layout.documents, device=device)
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        mask = mask & (owner[:, None] == owner[None, :])
        ahead = None if ahead is None else ahead & (owner[:, None] == owner[None, :])
        starts = (sizes.cumsum(0) - sizes)[owner]
        q, k = q - starts[:, None], k - starts[None, :]
    if rule.window is not None:
        near = (q - k) if rule.causal else (q - k).abs()
        mask = mask & (near < rule.window)
    if ahead is not None and layout.blocks is not None and not layout.blocks.windowed:
        mask = mask | ahead
    mask = mask.view(-1, 1, queries, keys)
    if rule.chunk is not None:
        if layout.keep is not None:  # a row's positions start at its first real token
            first = layout.keep.long().argmax(1)[:, None, None]
            q, k = q - first, k - first
        mask = mask & (q // rule.chunk == k // rule.chunk).view(-1, 1, queries, keys)
    if layout.keep is not None:
        # A query that would see nothing sees itself, so that its softmax stays finite.
        itself = (
            torch.arange(keys, device=device)[None, :]
            == torch.arange(layout.past, layout.past + queries, device=device)[:, None]
        )
        itself = itself[None, None]
        if not rule.causal:
            itself = itself & ~layout.keep.any(1)[:, None, None, None]
        mask = (mask & layout.keep[:, None, None, :]) | itself
    return mask


def _same_block(layout: Layout, blocks: Blocks, queries: int, keys: int) -> Tensor:
    """[B, T, S]: True where query and key are of one block."""
    own = blocks.ids[:, layout.past : layout.past + queries, None]
    return (own == blocks.ids[:, None, :keys]) & (own >= 0)


def added_scores(
    layout: Layout, queries: int, keys: int, terms: ScoreTerms, device: torch.device
) -> Tensor | None:
    """What `terms` add to the scores [B or 1, H, T, S], fp32; None for nothing."""
    total: Tensor | None = None
    if terms.slopes is not None:
        q = torch.arange(layout.past, layout.past + queries, device=device)[:, None]
        k = torch.arange(keys, device=device)[None, :]
        total = (terms.slopes.float()[:, None, None] * (k - q))[None]
    if terms.bias is not None:
        part = _bias_of(terms.bias, layout, queries, keys).float()
        total = part if total is None else total + part
    return total


def _bias_of(bias: Tensor, layout: Layout, queries: int, keys: int) -> Tensor:
    """The part of `bias` [H, ≥T, ≥S] that belongs to these tokens, [B or 1, H, T, S]."""
    if layout.lengths is not None:
        q = k = torch.cat([torch.arange(n, device=bias.device) for n in layout.documents])
        return bias[None, :, q[:, None], k[None, :]]
    if layout.keep is None:
        return bias[None, :, layout.past : layout.past + queries, :keys]
    first = layout.keep.long().argmax(1)[:, None]  # a row's positions start at its first real token
    k = (torch.arange(keys, device=bias.device) - first).clamp(min=0)  # [B, S]
    q = k[:, layout.past : layout.past + queries]
    return bias[:, q[:, :, None], k[:, None, :]].transpose(0, 1)


@Op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    rule: Rule,
    terms: ScoreTerms = NO_TERMS,
) -> Tensor:
    """softmax(scale · q kᵀ + terms + mask) v for q [B, T, H, D], k, v [B, S, K, D] → [B, T, H, D].

    The head size of `v` may differ from that of `q` and `k`.
    """
    return _attended(q, k, v, layout, rule, terms, new_seed() if rule.dropout else 0)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms, seed: int
) -> Tensor:
    """The definition; `seed` draws which probabilities are dropped."""
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, dim=2).transpose(1, 2)
    v = v.repeat_interleave(groups, dim=2).transpose(1, 2)
    scores = (q.transpose(1, 2) @ k.transpose(2, 3)) * rule.scale  # [B, H, T, S]
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    queries, keys = scores.shape[2:]
    added = added_scores(layout, queries, keys, terms, q.device)
    if added is not None:
        scores = scores + added
    scores = scores.masked_fill(~visible(layout, queries, keys, rule, q.device), float("-inf"))
    if terms.sinks is not None:
        sinks = terms.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide)[..., :keys].to(v.dtype)
    if rule.dropout:
        weights = dropped(weights, rule.dropout, seed)
    return (weights @ v).transpose(1, 2)


def _runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Neighbouring documents of one length as (length, count)."""
    for length, same in groupby(lengths):
        yield length, len(list(same))


@attention.variant("branches", when=lambda q, k, v, layout, *a, **kw: is_branched(layout.lengths))
def branched_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms = NO_TERMS
) -> Tensor:
    """Shared beginnings are repeated for the attention alone; all else computes them once."""
    assert layout.lengths is not None
    plain = unshared(layout.lengths, q.device)
    wide_q, wide_k, wide_v = (t.index_select(1, plain.take) for t in (q, k, v))
    blocks = None if layout.blocks is None else layout.blocks.part((slice(None), plain.take))
    wide = Layout(plain.lengths, blocks=blocks)
    out = attention(wide_q, wide_k, wide_v, wide, rule, terms)
    return out.index_select(1, plain.back)


def _tiled(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms = NO_TERMS
) -> bool:
    plain = layout.past == 0 and layout.keep is None and rule.softcap is None
    plain = plain and layout.blocks is None
    same = q.shape[1] == k.shape[1] > 1 and q.shape[3] == v.shape[3]
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.shape[3] % 32 == 0
        and plain
        and same
        and terms == NO_TERMS
        and not rule.dropout
        and (
            rule.chunk is None
            or rule.chunk >= max(layout.documents if layout.lengths else (k.shape[1],))
        )
        and has_amx()
    )


@attention.variant("tiles", when=_tiled)
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms = NO_TERMS
) -> Tensor:
    """bf16 tiles of the CPU: every document alone, in one call for all of them."""
    lengths = layout.documents if layout.lengths else (q.shape[1],) * q.shape[0]
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    out = packed_attention(flat_q, flat_k, flat_v, lengths, rule.scale, rule.causal, rule.window)
    return out.view(q.shape)


@attention.variant("documents", when=lambda q, k, v, layout, *a, **kw: layout.lengths is not None)
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms = NO_TERMS
) -> Tensor:
    """Each document alone; neighbours of one length go as a batch."""
    outputs, at = [], 0
    for length, count in _runs(layout.documents):
        stop = at + length * count
        one = [t[0, at:stop].unflatten(0, (count, length)) for t in (q, k, v)]
        inner = Layout()
        if layout.blocks is not None:
            own = layout.blocks.ids[0, at:stop].unflatten(0, (count, length))
            inner = Layout(blocks=Blocks(own, layout.blocks.windowed))
        outputs.append(attention(*one, inner, rule, terms).flatten(0, 1))
        at = stop
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


def _fusable(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms = NO_TERMS
) -> bool:
    # With dropout torch has a fused kernel on GPUs alone.
    drops = rule.dropout > 0 and not q.is_cuda
    return rule.softcap is None and terms.sinks is None and layout.lengths is None and not drops


@attention.variant("fused", when=_fusable)
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms = NO_TERMS
) -> Tensor:
    """torch's fused kernel with the smallest mask that says the same."""
    queries, keys = q.shape[1], k.shape[1]
    mask, causal = None, rule.causal and queries > 1
    plain = layout.keep is None and layout.blocks is None and rule.sees_all(keys)
    if not (plain and (not causal or layout.past == 0)):
        mask, causal = visible(layout, queries, keys, rule, q.device), False
    added = added_scores(layout, queries, keys, terms, q.device)
    if added is not None:
        if causal:
            mask, causal = visible(layout, queries, keys, rule, q.device), False
        if mask is not None:
            added = added.masked_fill(~mask, float("-inf"))
        mask = added.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=causal,
        scale=rule.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


# Scores of a block, on a CPU and on a GPU.
BLOCK = {False: 2**22, True: 2**26}


@attention.variant("blocks", when=lambda q, k, v, layout, rule, *a, **kw: rule.dropout > 0)
def dropping_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, terms: ScoreTerms = NO_TERMS
) -> Tensor:
    """Blocks of queries whose probabilities are dropped; the backward pass forms them again.

    So no more than a block's scores are ever in memory, and its mask is drawn twice, not kept.
    """
    step = max(1, BLOCK[q.is_cuda] // (q.shape[0] * q.shape[2] * k.shape[1]))
    outputs = []
    for at, block in zip(range(0, q.shape[1], step), q.split(step, 1)):
        stop = layout.past + at + block.shape[1] if rule.causal else k.shape[1]
        keep = None if layout.keep is None else layout.keep[:, :stop]
        outputs.append(
            recomputed(
                _attended, block, k[:, :stop], v[:, :stop],
                Layout(None, layout.past + at, keep), rule, terms, new_seed(),
            )
        )  # fmt: skip
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
