"""The parts of a decoder block, each built from a small frozen spec.

Letters: B batch, T tokens, C hidden size, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError, nearest
from topwork.nn.cache import KVCache
from topwork.nn.rotary import RotarySpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention; `window` None sees all earlier tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: RotarySpec
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.heads} is no multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )


@dataclass(frozen=True)
class MlpSpec:
    """down(act(gate x) · up x)."""

    width: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act={self.activation!r} is not known"
                f"{nearest(self.activation, ACTIVATIONS)}"
            )


def linears(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Several linears of one input; those that tell their parts run as one fused function."""
    parts = [_parts(layer) for layer in layers]
    if any(part is None for part in parts):
        return tuple(layer(x) for layer in layers)
    return ops.lora_linears(x, [p for p in parts if p is not None], layers[0].training)


def _parts(layer: Any) -> ops.LinearParts | None:
    if type(layer) is nn.Linear:
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        return None if hooked else ops.LinearParts(layer.weight, layer.bias)
    tell = getattr(layer, "linear_parts", None)
    return tell() if tell is not None else None


class RmsNorm(nn.Module):
    """Root-mean-square norm with a learned `weight` [C]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Self-attention of one layer."""

    def __init__(self, spec: AttentionSpec, hidden: int, eps: float, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = nn.Linear(hidden, wide, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden, narrow, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden, narrow, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(wide, hidden, bias=spec.out_bias)
        if spec.qk_norm:
            self.q_norm = RmsNorm(spec.head_dim, eps)
            self.k_norm = RmsNorm(spec.head_dim, eps)

    def forward(
        self,
        x: Tensor,
        tables: dict[RotarySpec, tuple[Tensor, Tensor]],
        layout: ops.Layout,
        cache: KVCache | None,
    ) -> Tensor:
        """x [B, T, C] → [B, T, C]; `tables` holds cos and sin for each rotary spec."""
        spec = self.spec
        q, k, v = (
            y.unflatten(-1, (-1, spec.head_dim))
            for y in linears(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = tables[spec.rotary]
        q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            layout = layout.tail(q.shape[1], k.shape[1])
        y = ops.attention(q, k, v, layout, ops.Rule(spec.head_dim**-0.5, window=spec.window))
        return linears(y.flatten(2), (self.o_proj,))[0]


class Mlp(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, spec: MlpSpec, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, spec.width, bias=spec.bias)
        self.up_proj = nn.Linear(hidden, spec.width, bias=spec.bias)
        self.down_proj = nn.Linear(spec.width, hidden, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, (self.gate_proj, self.up_proj))
        if self.activation is F.silu:
            inner = ops.swiglu(gate, up)
        else:
            inner = self.activation(gate) * up
        return linears(inner, (self.down_proj,))[0]
