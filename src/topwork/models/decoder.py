"""One decoder for every Llama-shaped family, built from a list of per-layer specs.

x = embed(ids)
for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
logits = head(norm(x))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from topwork import ops
from topwork.models.base import CausalModel, Model
from topwork.models.config import Config
from topwork.models.heads import BareModel, SequenceClassifier, TokenClassifier
from topwork.nn.cache import KVCache
from topwork.nn.layers import Attention, AttentionSpec, Mlp, MlpSpec, RmsNorm
from topwork.nn.rotary import rotary_table
from topwork.weights import PLAIN, Table


@dataclass(frozen=True)
class LayerSpec:
    """What one block is made of."""

    attention: AttentionSpec
    mlp: MlpSpec


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder: sizes and one spec per layer."""

    vocab: int
    hidden: int
    context: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    tied: bool = False
    table: Table = PLAIN


class Block(nn.Module):
    """One layer: attention, then the MLP, each behind a norm and added to the stream."""

    def __init__(self, spec: LayerSpec, hidden: int, eps: float, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(spec.attention, hidden, eps, index)
        self.mlp = Mlp(spec.mlp, hidden)
        self.input_layernorm = RmsNorm(hidden, eps)
        self.post_attention_layernorm = RmsNorm(hidden, eps)

    def forward(
        self, x: Tensor, tables: dict[Any, Any], layout: ops.Layout, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables, layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: token ids to hidden states."""

    embedding = "embed_tokens"

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(
            Block(layer, spec.hidden, spec.norm_eps, i) for i, layer in enumerate(spec.layers)
        )
        self.norm = RmsNorm(spec.hidden, spec.norm_eps)
        self.checkpointing = False

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor,
        layout: ops.Layout,
        cache: KVCache | None = None,
    ) -> Tensor:
        """ids [B, T] or embeddings [B, T, C], `positions` [B, T] → hidden [B, T, C]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        kinds = {layer.attention.rotary for layer in self.spec.layers}
        tables = {kind: rotary_table(kind, positions, x.dtype) for kind in kinds}
        for block in self.layers:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, tables, layout, cache, use_reentrant=False)
            else:
                x = block(x, tables, layout, cache)
        return self.norm(x)


class CausalDecoder(CausalModel):
    """A `Decoder` under its name on the Hub (`model`) and its `lm_head`."""

    def __init__(self, config: Config, spec: DecoderSpec) -> None:
        super().__init__(config)
        self.model = Decoder(spec)
        self.lm_head = nn.Linear(spec.hidden, spec.vocab, bias=False)
        self.table = table_of(spec)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {}
        self.tie_weights()

    @property
    def trunk(self) -> Decoder:
        return self.model

    @property
    def layer_count(self) -> int:
        return self.model.layer_count

    @property
    def windows(self) -> list[int | None]:
        return [layer.attention.window for layer in self.model.spec.layers]


def table_of(spec: DecoderSpec, drop: tuple[str, ...] = (), fresh: tuple[str, ...] = ()) -> Table:
    """The family's table with what every Llama-shaped file may have or lack."""
    table = spec.table
    return replace(
        table,
        prefix="model.",
        drop=(*table.drop, r"rotary_emb\.inv_freq$", *drop),
        fresh=(*table.fresh, *fresh),
    )


LM_HEAD, SCORE = r"^lm_head\.", r"^score\."


def bare(config: Config, spec: DecoderSpec) -> BareModel:
    """The decoder without a head."""
    return BareModel(config, Decoder(spec), table=table_of(spec, drop=(LM_HEAD, SCORE)))


def sequence_classifier(config: Config, spec: DecoderSpec) -> SequenceClassifier:
    """The decoder with `score` over each text's last token."""
    table = table_of(spec, drop=(LM_HEAD,), fresh=(SCORE,))
    return SequenceClassifier(config, Decoder(spec), table=table)


def token_classifier(config: Config, spec: DecoderSpec) -> TokenClassifier:
    """The decoder with `score` over each token."""
    table = table_of(spec, drop=(LM_HEAD,), fresh=(SCORE,))
    return TokenClassifier(config, Decoder(spec), table=table, bias=True)


# Task name → the model of a Llama-shaped family, made of its configuration and spec.
DECODER_MODELS: dict[str, Callable[[Config, DecoderSpec], Model]] = {
    "base": bare,
    "causal-lm": CausalDecoder,
    "sequence-classification": sequence_classifier,
    "token-classification": token_classifier,
}
