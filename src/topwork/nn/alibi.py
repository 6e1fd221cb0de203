"""ALiBi: scores fall linearly with the distance of key and query (arXiv:2108.12409)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork import ops


def alibi_slopes(heads: int, max_bias: float = 8.0) -> Tensor:
    """Slopes [H], fp32: 2^(-max_bias·i/n) for i = 1 … n.

    Where `heads` is no power of two, n is the power below, and the slopes of 2n that lie between
    these follow, as many as are wanted.
    """
    n = 2 ** math.floor(math.log2(heads))
    own = torch.arange(1, n + 1) * (max_bias / n)
    between = torch.arange(1, 2 * n + 1, 2) * (max_bias / (2 * n))
    return torch.pow(2.0, -torch.cat((own, between)))[:heads]


@dataclass(frozen=True)
class AlibiSpec:
    """One slope per head. `factor` multiplies what is added to the scaled scores.

    `rounded`: slopes and slope · key position are rounded to bf16, as Falcon was trained.
    """

    heads: int
    max_bias: float = 8.0
    factor: float = 1.0
    rounded: bool = False

    def terms(self, keys: int, device: torch.device) -> ops.ScoreTerms:
        """What attention over at most `keys` positions adds to its scores."""
        slopes = alibi_slopes(self.heads, self.max_bias)
        if not self.rounded:
            return ops.ScoreTerms(slopes=(slopes * self.factor).to(device))
        by_key = (slopes.bfloat16()[:, None] * torch.arange(keys)).float() * self.factor
        return ops.ScoreTerms(bias=by_key.to(device)[:, None].expand(-1, keys, -1))
