"""Learned biases by the distance between query and key, in buckets (T5, MPNet)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_bucket(distance: Tensor, buckets: int, longest: int, both_sides: bool) -> Tensor:
    """The bucket of each `distance` (key position - query position), as in T5 (arXiv:1910.10683).

    Half of the buckets hold one distance each, the others grow by powers up to `longest` and
    beyond. With `both_sides` half of all are for keys after the query, else those count as zero.
    """
    after = torch.zeros_like(distance)
    if both_sides:
        buckets //= 2
        after = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(distance.float().clamp(min=1) / exact) / math.log(longest / exact)
    far = exact + (growth * (buckets - exact)).long()
    return after + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def relative_bias(table: Tensor, queries: int, keys: int, longest: int, both_sides: bool) -> Tensor:
    """Scores to add [H, T, S] from a `table` [buckets, H], for positions counted from zero."""
    at = torch.arange(max(queries, keys), device=table.device)
    distance = at[None, :keys] - at[:queries, None]
    bucket = relative_bucket(distance, table.shape[0], longest, both_sides)
    return table[bucket].permute(2, 0, 1)
