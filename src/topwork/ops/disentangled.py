"""DeBERTa's attention: content to content, content to position, position to content.

Letters: B batch, T tokens, H heads, D head size, R relative positions.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.attention import Layout
from topwork.ops.dispatch import Op
from topwork.ops.dropout import dropped, new_seed


@Op
def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    index: Tensor,
    layout: Layout,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · (q·k + q·Pk[δ] + k·Pq[δ])) v, all [B, T, H, D] (arXiv:2006.03654).

    Pk and Pq [R, H, D], either may be None; `index` [≥T, ≥T] holds δ for query and key. `dropout`:
    how many of the probabilities are dropped.
    """
    outputs, at = [], 0
    documents = (q.shape[1],) if layout.lengths is None else layout.documents
    for length, same in groupby(documents):
        count = len(list(same))
        stop = at + length * count
        rows = [t[0, at:stop].unflatten(0, (count, length)) for t in (q, k, v)]
        if layout.lengths is None:
            rows = [q, k, v]
        a, b, c = (t.transpose(1, 2) for t in rows)  # [B, H, T, D]
        bias = _position_scores(a, b, position_keys, position_queries, index[:length, :length])
        if bias is not None:
            bias = bias * scale
        out = _weighted(a, b, c, bias, scale, dropout).transpose(1, 2)
        if layout.lengths is None:
            return out
        outputs.append(out.flatten(0, 1))
        at = stop
    return torch.cat(outputs)[None]


def _weighted(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v, all [B, H, T, D]."""
    if not dropout:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = q @ k.transpose(2, 3) * scale
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores if bias is None else scores + bias).softmax(-1, dtype=wide)
    return dropped(weights.to(v.dtype), dropout, new_seed()) @ v


def _position_scores(
    q: Tensor, k: Tensor, position_keys: Tensor | None, position_queries: Tensor | None, at: Tensor
) -> Tensor | None:
    shape = (*q.shape[:3], at.shape[0])
    total = None
    if position_keys is not None:
        scores = q @ position_keys.permute(1, 2, 0)  # [B, H, T, R]
        total = scores.gather(-1, at.expand(shape))
    if position_queries is not None:
        scores = k @ position_queries.permute(1, 2, 0)
        part = scores.gather(-1, at.T.expand(shape)).transpose(2, 3)
        total = part if total is None else total + part
    return total
