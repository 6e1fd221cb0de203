"""Attention from one text to another: packed pairs, or padded rows."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.attention import Layout, Rule, attention
from topwork.ops.dispatch import Op


@Op
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    pairs: tuple[tuple[int, int], ...] | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · q kᵀ) v for q [B, T, H, D], k, v [B, S, H, D] → [B, T, H, D].

    `pairs`: queries and keys are packed in one row, so many of each per text. Otherwise `keep`
    [B, S] is False where a key is padding. `dropout`: how many of the probabilities are dropped.
    """
    rule = Rule(scale, causal=False, dropout=dropout)
    if pairs is None and keep is None:
        return attention(q, k, v, Layout(), rule)
    if pairs is None:
        assert keep is not None
        mask = keep[:, None, None, :]
        a, b, c = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(a, b, c, mask, dropout, scale=scale)
        return out.transpose(1, 2)
    outputs, at, key = [], 0, 0
    for (queries, keys), same in groupby(pairs):
        count = len(list(same))
        rows = q[0, at : at + queries * count].unflatten(0, (count, queries))
        theirs, values = (
            t[0, key : key + keys * count].unflatten(0, (count, keys)) for t in (k, v)
        )
        outputs.append(attention(rows, theirs, values, Layout(), rule).flatten(0, 1))
        at, key = at + queries * count, key + keys * count
    return torch.cat(outputs)[None]


def one_query(q: Tensor, k: Tensor, v: Tensor, scale: float, added: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ + added) v of one query per row, which sees all keys.

    q [B, 1, H, D], k, v [B, S, H, D], `added` [B or 1, H or 1, 1, S] → [B, 1, H · D].
    """
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(a, b, c, added, scale=scale)
    return y.transpose(1, 2).flatten(2)
