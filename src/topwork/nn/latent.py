"""Multi-head latent attention (arXiv:2405.04434): keys and values from one small latent.

Letters: B batch, T tokens, S keys, H heads, R latent rank, N and P the parts of a head without and
with positions, D head size of the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.nn.cache import KVCache
from topwork.nn.layers import linears
from topwork.nn.norms import NormSpec
from topwork.nn.rotary import RotarySpec

LATENT_NORM = NormSpec("rms", 1e-6)  # whatever the model's own eps


@dataclass(frozen=True)
class LatentAttentionSpec:
    """`plain` + `turned` is the size of a query's and key's head, `value` that of a value's.

    `query_rank` None: queries come straight from the stream. `bias`: on the first projections and
    the last. `dropout` of the probabilities.
    """

    heads: int
    plain: int
    turned: int
    value: int
    query_rank: int | None
    key_value_rank: int
    rotary: RotarySpec
    scale: float
    bias: bool = False
    dropout: float = 0.0
    window: ClassVar[int | None] = None

    def positional(self) -> tuple[RotarySpec, ...]:
        return (self.rotary,)

    def build(self, hidden: int, layer: int) -> LatentAttention:
        return LatentAttention(self, hidden, layer)


class LatentAttention(nn.Module):
    """Self-attention of one layer; the cache holds the latent, and one turned key for all heads."""

    def __init__(self, spec: LatentAttentionSpec, hidden: int, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        wide = spec.heads * (spec.plain + spec.turned)
        if spec.query_rank is None:
            self.q_proj = nn.Linear(hidden, wide, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, spec.query_rank, bias=spec.bias)
            self.q_a_layernorm = LATENT_NORM.build(spec.query_rank)
            self.q_b_proj = nn.Linear(spec.query_rank, wide, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden, spec.key_value_rank + spec.turned, bias=spec.bias
        )
        self.kv_a_layernorm = LATENT_NORM.build(spec.key_value_rank)
        self.kv_b_proj = nn.Linear(
            spec.key_value_rank, spec.heads * (spec.plain + spec.value), bias=False
        )
        self.o_proj = nn.Linear(spec.heads * spec.value, hidden, bias=spec.bias)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.query_rank is None:
            q, latent = linears(x, (self.q_proj, self.kv_a_proj_with_mqa))
            return q, latent
        small, latent = linears(x, (self.q_a_proj, self.kv_a_proj_with_mqa))
        return linears(self.q_a_layernorm(small), (self.q_b_proj,))[0], latent

    def forward(
        self, x: Tensor, tables: dict[Any, Any], layout: ops.Layout, cache: KVCache | None
    ) -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        spec, turn = self.spec, self.spec.rotary
        q, latent = self._projected(x)
        q = q.unflatten(-1, (spec.heads, -1))
        latent, key = latent.split((spec.key_value_rank, spec.turned), -1)
        latent, key = self.kv_a_layernorm(latent)[:, :, None], key[:, :, None]  # [B, T, 1, R or P]
        q_plain, q_turned = q.split((spec.plain, spec.turned), -1)
        cos, sin = tables[turn]
        q_turned, key = (ops.rotary(y, cos, sin, turn.interleaved) for y in (q_turned, key))
        if cache is not None:
            latent, key = cache.update(self.layer, latent, key)
            layout = layout.tail(q.shape[1], key.shape[1])
        expanded = linears(latent[:, :, 0], (self.kv_b_proj,))[0].unflatten(-1, (spec.heads, -1))
        k_plain, v = expanded.split((spec.plain, spec.value), -1)  # [B, S, H, N], [B, S, H, D]
        q = torch.cat((q_plain, q_turned), -1)
        k = torch.cat((k_plain, key.expand(-1, -1, spec.heads, -1)), -1)
        y = ops.attention(
            q, k, v, layout, ops.Rule(spec.scale, dropout=spec.dropout if self.training else 0.0)
        )
        return linears(y.flatten(2), (self.o_proj,))[0]
