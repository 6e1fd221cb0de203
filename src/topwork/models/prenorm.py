"""The block of vision transformers and of the texts beside them: norms before each part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.nn.layers import ACTIVATIONS, activation, linears
from topwork.nn.paths import part, place, place_parameter
from topwork.ops.cross import cross_attention
from topwork.ops.recompute import recomputed


@dataclass(frozen=True)
class PreNormNames:
    """Where the parts of a block stand in the checkpoint; `fused`: q, k and v are one linear."""

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    out: str = "self_attn.out_proj"
    norm_1: str = "layer_norm1"
    up: str = "mlp.fc1"
    down: str = "mlp.fc2"
    norm_2: str = "layer_norm2"
    scale_1: str = "layer_scale1.lambda1"
    scale_2: str = "layer_scale2.lambda1"
    fused: str | None = None


@dataclass(frozen=True)
class PreNormSpec:
    """A block that normalises before each part.

    `layer_scale`: what a learned factor per channel on each part begins with, None for no factor.
    `gated`: `up` gives gate and up together and feed is down(silu(gate) · up). `drop_path`: how
    often training leaves a part out for a row (arXiv:1603.09382). `attention_dropout` of the
    probabilities.
    """

    hidden: int
    heads: int
    width: int
    activation: str
    eps: float
    dropout: float = 0.0
    qkv_bias: bool = True
    causal: bool = False
    layer_scale: float | None = None
    gated: bool = False
    drop_path: float = 0.0
    attention_dropout: float = 0.0
    names: PreNormNames = PreNormNames()

    def __post_init__(self) -> None:
        activation(self.activation, "hidden_act")
        if self.hidden % self.heads:
            raise ConfigError(
                f"hidden_size={self.hidden} is no multiple of num_attention_heads={self.heads}"
            )


class PreNormBlock(nn.Module):
    """x = x + s₁ · attention(norm(x));   x = x + s₂ · feed(norm(x))."""

    def __init__(self, spec: PreNormSpec) -> None:
        super().__init__()
        self.spec = spec
        names, hidden = spec.names, spec.hidden
        place(self, names.norm_1, nn.LayerNorm(hidden, spec.eps))
        if names.fused is not None:
            place(self, names.fused, nn.Linear(hidden, 3 * hidden, bias=spec.qkv_bias))
        else:
            for path in (names.query, names.key, names.value):
                place(self, path, nn.Linear(hidden, hidden, bias=spec.qkv_bias))
        place(self, names.out, nn.Linear(hidden, hidden))
        place(self, names.norm_2, nn.LayerNorm(hidden, spec.eps))
        place(self, names.up, nn.Linear(hidden, spec.width * (2 if spec.gated else 1)))
        place(self, names.down, nn.Linear(spec.width, hidden))
        if spec.layer_scale is not None:
            for path in (names.scale_1, names.scale_2):
                place_parameter(self, path, torch.full((hidden,), spec.layer_scale))

    def forward(self, x: Tensor, layout: ops.Layout) -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        names = self.spec.names
        x = self._add(x, self._look(part(self, names.norm_1)(x), layout), names.scale_1)
        return self._add(x, self._feed(part(self, names.norm_2)(x)), names.scale_2)

    def _add(self, x: Tensor, y: Tensor, scale: str) -> Tensor:
        spec = self.spec
        y = F.dropout(y, spec.dropout, self.training)
        if spec.layer_scale is not None:
            y = y * part(self, scale)
        if spec.drop_path and self.training:
            keep = 1 - spec.drop_path
            rows = torch.empty(len(y), 1, 1, dtype=y.dtype, device=y.device)
            y = y * rows.bernoulli_(keep) / keep
        return x + y

    def _look(self, x: Tensor, layout: ops.Layout) -> Tensor:
        spec, names = self.spec, self.spec.names
        paths = (names.query, names.key, names.value)
        paths = paths if names.fused is None else (names.fused,)
        made = linears(x, [part(self, path) for path in paths])
        made = made if names.fused is None else made[0].chunk(3, -1)
        q, k, v = (y.unflatten(-1, (spec.heads, -1)) for y in made)
        scale = (spec.hidden // spec.heads) ** -0.5
        drop = spec.attention_dropout if self.training else 0.0
        if layout.keep is None or spec.causal:
            y = ops.attention(q, k, v, layout, ops.Rule(scale, spec.causal, dropout=drop))
        else:  # what is padding, and may be read, sees all that is real
            y = cross_attention(q, k, v, scale, keep=layout.keep, dropout=drop)
        return linears(y.flatten(2), (part(self, names.out),))[0]

    def _feed(self, x: Tensor) -> Tensor:
        spec, names = self.spec, self.spec.names
        inner = linears(x, (part(self, names.up),))[0]
        if spec.gated:
            inner = ops.swiglu(*inner.chunk(2, -1))
        else:
            inner = ACTIVATIONS[spec.activation](inner)
        return linears(inner, (part(self, names.down),))[0]


def run_block(block: nn.Module, x: Tensor, layout: ops.Layout, again: bool) -> Tensor:
    """One block; `again`: its inner values are computed a second time in the backward pass."""
    if again and torch.is_grad_enabled():
        return recomputed(block, x, layout)
    return block(x, layout)
