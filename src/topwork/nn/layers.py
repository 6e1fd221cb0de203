"""The parts of a decoder block, each built from a small frozen spec.

Letters: B batch, T tokens, C hidden size, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError, nearest
from topwork.nn.cache import KVCache
from topwork.nn.norms import NormSpec
from topwork.nn.rotary import RotarySpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
}


def activation(name: str, option: str = "activation") -> str:
    """`name`, when it is known. ConfigError with the nearest one otherwise."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{option}={name!r} is not known{nearest(name, ACTIVATIONS)}")
    return name


@dataclass(frozen=True)
class QkNorm:
    """A norm on queries and keys, before the rotary turn or `after_rotary`.

    `over`: "head", one weight [D] for all heads; "heads", a weight [H, D]; "width", one norm over
    all heads together, before they are told apart.
    """

    norm: NormSpec
    over: Literal["head", "heads", "width"] = "head"
    names: tuple[str, str] = ("q_norm", "k_norm")
    after_rotary: bool = False

    def build(self, heads: int, size: int) -> nn.Module:
        shapes = {"head": (size,), "heads": (heads, size), "width": (heads * size,)}
        return self.norm.build(*shapes[self.over])


@dataclass(frozen=True)
class Temperature:
    """Queries far on are scaled by 1 + weight · log(1 + ⌊(position + 1) / floor⌋) (Llama 4)."""

    floor: float
    weight: float

    def table(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor of each query, [B, T, 1, 1]."""
        steps = torch.log1p(torch.floor((positions.float() + 1) / self.floor))
        return (steps * self.weight + 1)[..., None, None]


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention.

    `rotary` None: no positions; `window` None sees all earlier tokens, `chunk` those of its own
    chunk. `scale` None is D^-½. `softcap` bounds the scores, `clip` the values of q, k, v. `sinks`:
    a learned score per head that takes weight and gives nothing. `fused`: q, k and v are one linear
    `qkv_proj`; `out` names the linear behind attention. `dropout` of the probabilities.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: RotarySpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    window: int | None = None
    chunk: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    clip: float | None = None
    temperature: Temperature | None = None
    fused: bool = False
    out: str = "o_proj"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.heads} is no multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )
        for name in ("window", "chunk", "softcap", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"attention {name}={value} must be positive")

    def positional(self) -> tuple[RotarySpec | Temperature, ...]:
        """The parts that need a table by position."""
        return tuple(part for part in (self.rotary, self.temperature) if part is not None)

    def build(self, hidden: int, layer: int) -> Attention:
        return Attention(self, hidden, layer)


@dataclass(frozen=True)
class MlpSpec:
    """down(act(gate x) · up x). `fused`: gate and up are one linear `gate_up_proj`."""

    width: int
    activation: str = "silu"
    bias: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        activation(self.activation, "hidden_act")

    def build(self, hidden: int) -> Mlp:
        return Mlp(self, hidden)


@dataclass(frozen=True)
class PlainMlpSpec:
    """down(act(up x)), the two linears under `names`."""

    width: int
    activation: str
    bias: bool = True
    names: tuple[str, str] = ("up_proj", "down_proj")

    def __post_init__(self) -> None:
        activation(self.activation, "hidden_act")

    def build(self, hidden: int) -> PlainMlp:
        return PlainMlp(self, hidden)


def linears(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Several linears of one input; those that tell their parts run as one fused function."""
    parts = [_parts(layer) for layer in layers]
    if any(part is None for part in parts):
        return tuple(layer(x) for layer in layers)
    return ops.lora_linears(x, [p for p in parts if p is not None], layers[0].training)


def activated(x: Tensor, layer: nn.Module, name: str) -> Tensor:
    """The activation of a linear."""
    parts = _parts(layer) if name == "gelu" else None
    if parts is None:
        return ACTIVATIONS[name](linears(x, (layer,))[0])
    return ops.linear_gelu(x, parts, layer.training)


def _parts(layer: Any) -> ops.LinearParts | None:
    if type(layer) is nn.Linear:
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        return None if hooked else ops.LinearParts(layer.weight, layer.bias)
    tell = getattr(layer, "linear_parts", None)
    return tell() if tell is not None else None


class Attention(nn.Module):
    """Self-attention of one layer."""

    def __init__(self, spec: AttentionSpec, hidden: int, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.widths = (wide, narrow, narrow)
        if spec.fused:
            self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=spec.qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, wide, bias=spec.qkv_bias)
            self.k_proj = nn.Linear(hidden, narrow, bias=spec.qkv_bias)
            self.v_proj = nn.Linear(hidden, narrow, bias=spec.qkv_bias)
        self.add_module(spec.out, nn.Linear(wide, hidden, bias=spec.out_bias))
        if spec.qk_norm is not None:
            for name, heads in zip(spec.qk_norm.names, (spec.heads, spec.kv_heads)):
                self.add_module(name, spec.qk_norm.build(heads, spec.head_dim))
        if spec.sinks:
            self.sinks = nn.Parameter(torch.zeros(spec.heads))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.spec.fused:
            return linears(x, (self.qkv_proj,))[0].split(self.widths, -1)
        return linears(x, (self.q_proj, self.k_proj, self.v_proj))

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.spec.qk_norm is not None
        norm_q, norm_k = (getattr(self, name) for name in self.spec.qk_norm.names)
        return norm_q(q), norm_k(k)

    def _queries_keys_values(
        self, x: Tensor, tables: dict[Any, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec, norm = self.spec, self.spec.qk_norm
        q, k, v = self._projected(x)
        if norm is not None and norm.over == "width":
            q, k = self._normed(q, k)
        if spec.clip is not None:
            q, k, v = (y.clamp(-spec.clip, spec.clip) for y in (q, k, v))
        q, k, v = (y.unflatten(-1, (-1, spec.head_dim)) for y in (q, k, v))
        if norm is not None and norm.over != "width" and not norm.after_rotary:
            q, k = self._normed(q, k)
        if spec.rotary is not None:
            cos, sin = tables[spec.rotary]
            q, k = (ops.rotary(y, cos, sin, spec.rotary.interleaved) for y in (q, k))
        if norm is not None and norm.after_rotary:
            q, k = self._normed(q, k)
        if spec.temperature is not None:
            q = (q * tables[spec.temperature]).to(q.dtype)
        return q, k, v

    def forward(
        self, x: Tensor, tables: dict[Any, Any], layout: ops.Layout, cache: KVCache | None
    ) -> Tensor:
        """x [B, T, C] → [B, T, C]; `tables`: each positional part's table."""
        spec = self.spec
        q, k, v = self._queries_keys_values(x, tables)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            layout = layout.tail(q.shape[1], k.shape[1])
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        rule = ops.Rule(
            scale,
            window=spec.window,
            chunk=spec.chunk,
            softcap=spec.softcap,
            dropout=spec.dropout if self.training else 0.0,
        )
        terms = ops.ScoreTerms(sinks=self.sinks if spec.sinks else None)
        y = ops.attention(q, k, v, layout, rule, terms)
        return linears(y.flatten(2), (getattr(self, spec.out),))[0]


class Mlp(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, spec: MlpSpec, hidden: int) -> None:
        super().__init__()
        self.fused = spec.fused
        if spec.fused:
            self.gate_up_proj = nn.Linear(hidden, 2 * spec.width, bias=spec.bias)
        else:
            self.gate_proj = nn.Linear(hidden, spec.width, bias=spec.bias)
            self.up_proj = nn.Linear(hidden, spec.width, bias=spec.bias)
        self.down_proj = nn.Linear(spec.width, hidden, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = linears(x, (self.gate_up_proj,))[0].chunk(2, -1)
        else:
            gate, up = linears(x, (self.gate_proj, self.up_proj))
        if self.activation is F.silu:
            inner = ops.swiglu(gate, up)
        else:
            inner = self.activation(gate) * up
        return linears(inner, (self.down_proj,))[0]


class PlainMlp(nn.Module):
    """The feed-forward part without a gate."""

    def __init__(self, spec: PlainMlpSpec, hidden: int) -> None:
        super().__init__()
        self.names = spec.names
        self.add_module(spec.names[0], nn.Linear(hidden, spec.width, bias=spec.bias))
        self.add_module(spec.names[1], nn.Linear(spec.width, hidden, bias=spec.bias))
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        up, down = (getattr(self, name) for name in self.names)
        return linears(self.activation(linears(x, (up,))[0]), (down,))[0]


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by `scale`, rounded to their dtype (Gemma)."""

    def __init__(self, rows: int, size: int, scale: float) -> None:
        super().__init__(rows, size)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(self.scale, dtype=self.weight.dtype)
