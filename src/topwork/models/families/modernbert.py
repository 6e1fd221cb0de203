"""ModernBERT: norms before each part, rotary positions, windows on two of three layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.encoder import EmbeddingSpec, EncoderSpec
from topwork.models.encoder_heads import FamilySpec, HeadSpec, encoder_models
from topwork.models.families._encoders import head_size
from topwork.nn.layers import ACTIVATIONS, activation, linears
from topwork.nn.rotary import RotarySpec, rotary_table

CASES = [
    {"local_attention": 8},
    {"local_attention": 4, "norm_bias": True, "attention_bias": True, "mlp_bias": True,
     "classifier_bias": True, "classifier_activation": "relu", "hidden_activation": "relu",
     "classifier_pooling": "mean", "norm_eps": 0.1},
    {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 6,
     "tie_word_embeddings": False, "decoder_bias": False,
     "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50.0},
                         "sliding_attention": {"rope_type": "linear", "rope_theta": 20.0,
                                               "factor": 2.0}}},
]  # fmt: skip
KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ModernSpec:
    """One block. `first`: without a norm before its attention, for the embeddings have one."""

    hidden: int
    heads: int
    width: int
    activation: str
    eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    rotary: RotarySpec
    window: int | None
    first: bool
    dropouts: tuple[float, float]


class ModernAttention(nn.Module):
    """Fused q, k, v; rotary."""

    def __init__(self, spec: ModernSpec) -> None:
        super().__init__()
        self.spec = spec
        self.Wqkv = nn.Linear(spec.hidden, 3 * spec.hidden, bias=spec.attention_bias)
        self.Wo = nn.Linear(spec.hidden, spec.hidden, bias=spec.attention_bias)

    def forward(self, x: Tensor, tables: Any, layout: ops.Layout) -> Tensor:
        size = self.spec.hidden // self.spec.heads
        q, k, v = linears(x, (self.Wqkv,))[0].unflatten(-1, (3, -1, size)).unbind(2)
        cos, sin = tables[self.spec.rotary]
        q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        drop = self.spec.dropouts[0] if self.training else 0.0
        rule = ops.Rule(size**-0.5, causal=False, window=self.spec.window, dropout=drop)
        y = linears(ops.attention(q, k, v, layout, rule).flatten(2), (self.Wo,))[0]
        return F.dropout(y, self.spec.dropouts[0], self.training)


class ModernMlp(nn.Module):
    """Wo(act(a) · b), where Wi gives a and b."""

    def __init__(self, spec: ModernSpec) -> None:
        super().__init__()
        self.spec = spec
        self.Wi = nn.Linear(spec.hidden, 2 * spec.width, bias=spec.mlp_bias)
        self.Wo = nn.Linear(spec.width, spec.hidden, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = linears(x, (self.Wi,))[0].chunk(2, -1)
        inner = ACTIVATIONS[self.spec.activation](a) * b
        return linears(F.dropout(inner, self.spec.dropouts[1], self.training), (self.Wo,))[0]


class ModernBlock(nn.Module):
    """x = x + attn(norm(x));   x = x + mlp(norm(x))."""

    def __init__(self, spec: ModernSpec) -> None:
        super().__init__()
        self.attn_norm: nn.Module = nn.Identity()
        if not spec.first:
            self.attn_norm = nn.LayerNorm(spec.hidden, spec.eps, bias=spec.norm_bias)
        self.attn = ModernAttention(spec)
        self.mlp_norm = nn.LayerNorm(spec.hidden, spec.eps, bias=spec.norm_bias)
        self.mlp = ModernMlp(spec)

    def forward(self, x: Tensor, tables: Any, layout: ops.Layout) -> Tensor:
        x = x + self.attn(self.attn_norm(x), tables, layout)
        return x + self.mlp(self.mlp_norm(x))


@dataclass(frozen=True)
class Angles:
    """The rotary tables of both kinds of layers."""

    kinds: frozenset[RotarySpec]

    def place(self, encoder: nn.Module) -> None:
        """It has no parameters."""

    def shared(
        self, encoder: nn.Module, positions: Tensor, longest: int, like: Tensor
    ) -> dict[RotarySpec, tuple[Tensor, Tensor]]:
        return {kind: rotary_table(kind, positions, like.dtype) for kind in self.kinds}


def rotaries(read: ConfigReader, size: int) -> dict[str, RotarySpec]:
    """By kind of layer: `rope_parameters`, or the two thetas of the first files."""
    given, context = read("rope_parameters", {}), read("max_position_embeddings", 8192)
    thetas = {
        "full_attention": read("global_rope_theta", 160_000.0),
        "sliding_attention": read("local_rope_theta", 10_000.0),
    }
    found = {}
    for kind in KINDS:
        options = dict(given.get(kind) or {})
        scaling = options.pop("rope_type", "default")
        theta = options.pop("rope_theta", thetas[kind])
        if scaling not in ("default", "linear", "dynamic") or set(options) - {"factor"}:
            raise ConfigError(f"rope_parameters of {kind}: {given[kind]!r} is not supported")
        factor = float(options.get("factor", 1.0))
        found[kind] = RotarySpec(size, float(theta), context, scaling, factor, context)
    return found


def blocks(read: ConfigReader) -> list[ModernSpec]:
    hidden, heads = read.need("hidden_size"), read.need("num_attention_heads")
    count = read.need("num_hidden_layers")
    every = read("global_attn_every_n_layers", 3)
    kinds = read("layer_types", [KINDS[1] if i % every else KINDS[0] for i in range(count)])
    if len(kinds) != count or set(kinds) - set(KINDS):
        raise ConfigError(f"layer_types={kinds!r} does not describe {count} layers")
    rotary = rotaries(read, head_size(hidden, heads))
    # Files of today may write half of it as `sliding_window`.
    half = read("sliding_window", read("local_attention", 128) // 2)
    return [
        ModernSpec(
            hidden,
            heads,
            read.need("intermediate_size"),
            activation(read("hidden_activation", "gelu")),
            read("norm_eps", 1e-5),
            bool(read("norm_bias", False)),
            bool(read("attention_bias", False)),
            bool(read("mlp_bias", False)),
            rotary[kind],
            half + 1 if kind == KINDS[1] else None,
            first=i == 0,
            dropouts=(read.rate("attention_dropout"), read.rate("mlp_dropout")),
        )
        for i, kind in enumerate(kinds)
    ]


def family(read: ConfigReader) -> FamilySpec:
    read.ignore(
        "cls_token_id", "sparse_prediction", "sparse_pred_ignore_index", "layer_norm_eps",
        "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad",
        "initializer_cutoff_factor", "position_embedding_type", "gradient_checkpointing",
    )  # fmt: skip
    specs = blocks(read)
    bias, pooling = specs[0].norm_bias, read("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ConfigError(f"classifier_pooling={pooling!r} is neither 'cls' nor 'mean'")
    embedding = EmbeddingSpec(
        read.need("vocab_size"),
        specs[0].hidden,
        word="embeddings.tok_embeddings",
        norm="embeddings.norm",
        norm_bias=bias,
    )
    encoder = EncoderSpec(
        specs[0].hidden,
        specs[0].eps,
        read.rate("embedding_dropout"),
        embedding,
        tuple(f"layers.{i}" for i in range(len(specs))),
        lambda i: ModernBlock(specs[i]),
        relation=Angles(frozenset(spec.rotary for spec in specs)),
        final_norm="final_norm",
    )

    def head(out: str, pool: str | None = None, **options: Any) -> HeadSpec:
        return HeadSpec(
            out, "head.dense", activation(read("classifier_activation", "gelu")), "head.norm",
            bias, bool(read("classifier_bias", False)), pool=pool, **options,
        )  # fmt: skip

    dropout = read.rate("classifier_dropout")
    pool = "mean" if pooling == "mean" else "first"
    heads = {
        "masked-lm": head("decoder", out_bias=bool(read("decoder_bias", True))),
        "sequence-classification": head("classifier", pool, dropout=dropout),
        "token-classification": head("classifier", dropout=dropout),
        "question-answering": head("classifier", dropout=dropout),
        "multiple-choice": head("classifier", pool, dropout=dropout),
    }
    return FamilySpec("model", encoder, heads, bool(read("tie_word_embeddings", True)))


MODELS = encoder_models(family)
