"""Attention from one text to another: packed pairs, or padded rows."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op


@Op
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    pairs: tuple[tuple[int, int], ...] | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v for q [B, T, H, D], k, v [B, S, H, D] → [B, T, H, D].

    `pairs`: queries and keys are packed in one row, so many of each per text. Otherwise `keep`
    [B, S] is False where a key is padding.
    """
    if pairs is None:
        mask = None if keep is None else keep[:, None, None, :]
        a, b, c = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(a, b, c, attn_mask=mask, scale=scale).transpose(1, 2)
    outputs, at, key = [], 0, 0
    for (queries, keys), same in groupby(pairs):
        count = len(list(same))
        rows = q[0, at : at + queries * count].unflatten(0, (count, queries)).transpose(1, 2)
        theirs, values = (
            t[0, key : key + keys * count].unflatten(0, (count, keys)).transpose(1, 2)
            for t in (k, v)
        )
        out = F.scaled_dot_product_attention(rows, theirs, values, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        at, key = at + queries * count, key + keys * count
    return torch.cat(outputs)[None]
