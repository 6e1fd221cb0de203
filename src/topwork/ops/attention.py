"""Causal attention over packed documents, padded rows or a cache.

Letters: B batch, T queries, S keys, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op


@dataclass(frozen=True)
class Layout:
    """Which keys each query may see, beside the causal rule.

    `lengths`: the documents that lie one after the other in a single row (then B is 1 and there is
    no cache). Otherwise `past` keys stand before the first query, and `keep` [B, S] is False
    where a key is padding (None: no padding).
    """

    lengths: tuple[int, ...] | None = None
    past: int = 0
    keep: Tensor | None = None


def visible(layout: Layout, queries: int, keys: int, window: int | None, device: torch.device
            ) -> Tensor:  # fmt: skip
    """The boolean mask [B or 1, 1, T, S]: True where the query may see the key."""
    q = torch.arange(layout.past, layout.past + queries, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    mask = k <= q
    if window is not None:
        mask = mask & (k > q - window)
    if layout.lengths is not None:
        owner = torch.repeat_interleave(
            torch.arange(len(layout.lengths), device=device),
            torch.tensor(layout.lengths, device=device),
        )
        mask = mask & (owner[:, None] == owner[None, :])
    mask = mask[None, None]
    if layout.keep is not None:
        # A query that is padding itself sees itself, so that its softmax stays finite.
        mask = (mask & layout.keep[:, None, None, :]) | (k == q)[None, None]
    return mask


@Op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for q [B, T, H, D], k and v [B, S, K, D] → [B, T, H, D].

    A query at position p sees the keys p-window+1 … p (all up to p without a `window`).
    """
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, dim=2).transpose(1, 2)
    v = v.repeat_interleave(groups, dim=2).transpose(1, 2)
    scores = (q.transpose(1, 2) @ k.transpose(2, 3)) * scale  # [B, H, T, S]
    mask = visible(layout, q.shape[1], k.shape[2], window, q.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def _runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Neighbouring documents of one length as (length, count)."""
    for length, same in groupby(lengths):
        yield length, len(list(same))


@attention.variant("documents", when=lambda q, k, v, layout, *a, **kw: layout.lengths is not None)
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """Each document alone through the fused kernel; neighbours of one length go as a batch."""
    assert layout.lengths is not None
    outputs, at = [], 0
    for length, count in _runs(layout.lengths):
        stop = at + length * count
        one = [t[0, at:stop].unflatten(0, (count, length)) for t in (q, k, v)]
        mask = None
        if window is not None and window < length:
            mask = visible(Layout(), length, length, window, q.device)
        outputs.append(_sdpa(*one, scale=scale, mask=mask, causal=mask is None).flatten(0, 1))
        at = stop
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


@attention.variant("fused", when=lambda *a, **kw: True)
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """torch's fused kernel with the smallest mask that says the same."""
    queries, keys = q.shape[1], k.shape[1]
    unmasked = layout.keep is None and (window is None or window >= keys)
    if unmasked and (queries == 1 or layout.past == 0):
        return _sdpa(q, k, v, scale=scale, mask=None, causal=queries > 1)
    return _sdpa(
        q, k, v, scale=scale, mask=visible(layout, queries, keys, window, q.device), causal=False
    )


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, causal: bool
) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
