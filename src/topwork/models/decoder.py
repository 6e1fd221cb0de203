"""One decoder for every Llama-shaped family, built from a list of per-layer specs.

x = embed(ids)
for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
logits = head(norm(x))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from topwork import ops
from topwork.models.base import CausalModel
from topwork.nn.cache import KVCache
from topwork.nn.layers import Attention, AttentionSpec, Mlp, MlpSpec, RmsNorm
from topwork.nn.rotary import rotary_table


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

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(
            Block(layer, spec.hidden, spec.norm_eps, i) for i, layer in enumerate(spec.layers)
        )
        self.norm = RmsNorm(spec.hidden, spec.norm_eps)
        self.checkpointing = False

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

    def __init__(self, config: Any, spec: DecoderSpec) -> None:
        super().__init__(config)
        self.model = Decoder(spec)
        self.lm_head = nn.Linear(spec.hidden, spec.vocab, bias=False)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {}
        self.tie_weights()

    @property
    def trunk(self) -> Decoder:
        return self.model

    @property
    def layer_count(self) -> int:
        return len(self.model.spec.layers)


# Task name → the model of a Llama-shaped family, made as `cls(config, spec)`.
DECODER_MODELS = {"causal-lm": CausalDecoder}
