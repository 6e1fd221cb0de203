"""One decoder for every Llama-shaped family, built from a list of per-layer specs.

x = embed(ids)
for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
logits = head(norm(x))

Where norms stand (before a branch, behind it, both), and which attention and MLP a layer has, is
the spec's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.models.base import CausalLMOutput, CausalModel, Model
from topwork.models.config import Config
from topwork.models.heads import (
    BareModel,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from topwork.nn.cache import KVCache
from topwork.nn.layers import ScaledEmbedding
from topwork.nn.moe import RouterLoss, balance, router_logits
from topwork.nn.norms import NormSpec
from topwork.nn.paths import part, place
from topwork.ops.recompute import recomputed
from topwork.weights import PLAIN, Rename, Table


class Mixer(Protocol):
    """The spec of a block's attention."""

    @property
    def window(self) -> int | None: ...

    def positional(self) -> tuple[Any, ...]:
        """The parts that need a table by position, each with `table(positions, dtype)`."""
        ...

    def build(self, hidden: int, layer: int) -> nn.Module: ...


class FeedForward(Protocol):
    """The spec of what stands behind attention in a block."""

    def build(self, hidden: int) -> nn.Module: ...


@dataclass(frozen=True)
class BlockNorms:
    """Under which names a block's norms stand around its two branches; None: no norm there."""

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None

    def names(self) -> tuple[str, ...]:
        places = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return tuple(name for name in places if name is not None)


PRE_NORMS = BlockNorms()
ONE_NORM = BlockNorms(mlp_in=None)  # of a parallel block
POST_NORMS = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH_NORMS = BlockNorms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class LayerSpec:
    """What one block is made of.

    `parallel`: the MLP reads what attention reads. `residual` multiplies each branch before it is
    added; `dropout`: the rates on the two branches, in training. `mlp_name`: the MLP's name in the
    checkpoint.
    """

    attention: Mixer
    mlp: FeedForward
    norms: BlockNorms = PRE_NORMS
    parallel: bool = False
    residual: float = 1.0
    dropout: tuple[float, float] = (0.0, 0.0)
    mlp_name: str = "mlp"


@dataclass(frozen=True)
class HeadSpec:
    """logits = softcap(scale · (W x + b))."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder: sizes and one spec per layer.

    `embedding_scale` belongs to the embedding (rounded to its dtype), `input_scale` multiplies
    whatever enters, given embeddings too; `embedding_dropout` acts on it in training.
    `router_loss`: the routers' load-balancing loss, in families with experts that have one.
    `answers`: the trunk's name in files of the family's question answerer.
    """

    vocab: int
    hidden: int
    context: int
    norm: NormSpec
    layers: tuple[LayerSpec, ...]
    tied: bool = False
    embedding_scale: float = 1.0
    input_scale: float = 1.0
    embedding_dropout: float = 0.0
    head: HeadSpec = HeadSpec()
    router_loss: RouterLoss | None = None
    answers: str = "model"
    table: Table = PLAIN


class Block(nn.Module):
    """One layer: attention, then the MLP, each between its norms and added to the stream."""

    def __init__(self, spec: LayerSpec, hidden: int, norm: NormSpec, index: int) -> None:
        super().__init__()
        self.spec = spec
        self.self_attn = spec.attention.build(hidden, index)
        self.add_module(spec.mlp_name, spec.mlp.build(hidden))
        for name in spec.norms.names():
            self.add_module(name, norm.build(hidden))

    def forward(
        self, x: Tensor, tables: dict[Any, Any], layout: ops.Layout, cache: KVCache | None
    ) -> Tensor:
        norms, mlp = self.spec.norms, getattr(self, self.spec.mlp_name)
        seen = self._norm(norms.attention_in, x)
        branch = self._norm(norms.attention_out, self.self_attn(seen, tables, layout, cache))
        after = self._added(x, branch, self.spec.dropout[0])
        if not self.spec.parallel:
            seen = self._norm(norms.mlp_in, after)
        return self._added(after, self._norm(norms.mlp_out, mlp(seen)), self.spec.dropout[1])

    def _norm(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else getattr(self, name)(x)

    def _added(self, x: Tensor, branch: Tensor, dropout: float) -> Tensor:
        if dropout and self.training:
            branch = F.dropout(branch, dropout)
        return x + branch if self.spec.residual == 1 else x + branch * self.spec.residual


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: token ids to hidden states."""

    embedding = "embed_tokens"

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = (
            nn.Embedding(spec.vocab, spec.hidden)
            if spec.embedding_scale == 1
            else ScaledEmbedding(spec.vocab, spec.hidden, spec.embedding_scale)
        )
        self.layers = nn.ModuleList(
            Block(layer, spec.hidden, spec.norm, i) for i, layer in enumerate(spec.layers)
        )
        self.norm = spec.norm.build(spec.hidden)
        self.checkpointing = False

    @property
    def block_list(self) -> Any:
        return self.layers

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
        if self.spec.input_scale != 1:
            x = x * self.spec.input_scale
        if self.spec.embedding_dropout and self.training:
            x = F.dropout(x, self.spec.embedding_dropout)
        parts = {part for layer in self.spec.layers for part in layer.attention.positional()}
        tables = {part: part.table(positions, x.dtype) for part in parts}
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, tables, layout, cache)
            else:
                x = block(x, tables, layout, cache)
        return self.norm(x)


class CausalDecoder(CausalModel):
    """A `Decoder` and its head under their names on the Hub."""

    trunk_path, head_path = "model", "lm_head"

    def __init__(self, config: Config, spec: DecoderSpec) -> None:
        super().__init__(config)
        self.table = table_of(spec)
        self._add_decoder(spec)
        self.tie_weights()

    def _add_decoder(self, spec: DecoderSpec) -> None:
        head = nn.Linear(spec.hidden, spec.vocab, bias=spec.head.bias)
        place(self, self.trunk_path, Decoder(spec))
        place(self, self.head_path, head)
        words = f"{self.trunk_path}.embed_tokens.weight"
        self.tied = {f"{self.head_path}.weight": words} if spec.tied else {}

    @property
    def trunk(self) -> Decoder:
        return part(self, self.trunk_path)

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    def get_output_embeddings(self) -> nn.Module:
        return part(self, self.head_path)

    @property
    def windows(self) -> list[int | None]:
        return [layer.attention.window for layer in self.trunk.spec.layers]

    @property
    def turning_point(self) -> int | None:
        rotaries = (getattr(layer.attention, "rotary", None) for layer in self.trunk.spec.layers)
        turns = [r.original for r in rotaries if r is not None and r.kind == "longrope"]
        return min(turns, default=None)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C]."""
        spec, logits = self.trunk.spec.head, super().head(hidden)
        if spec.scale != 1:
            logits = logits * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        return logits

    def token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability [N] fp32 of `targets` [N] after `hidden` [N, C]; exact, in chunks."""
        if self.trunk.spec.head == HeadSpec():
            return super().token_logprobs(hidden, targets)
        return ops.token_logprobs_of(self.head, hidden, targets)

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """The familiar call; with labels, a routers' loss that the spec asks for joins the loss."""
        wanted = self.router_loss
        if wanted is None or not wanted.asked:
            return super().forward(*args, **kwargs)
        with router_logits(self.trunk) as logits:
            output = super().forward(*args, **kwargs)
        output.aux_loss = balance(self.trunk, logits)
        if output.loss is not None:
            output.loss = output.loss + wanted.weight * output.aux_loss
        return output

    @property
    def router_loss(self) -> RouterLoss | None:
        """The routers' loss that the configuration names; None in families without one."""
        return self.trunk.spec.router_loss


def table_of(spec: DecoderSpec, drop: tuple[str, ...] = (), fresh: tuple[str, ...] = ()) -> Table:
    """The family's table with what every Llama-shaped file may have or lack."""
    table = spec.table
    return replace(
        table,
        prefix="model.",
        drop=(*table.drop, r"rotary_emb\.inv_freq$", *drop),
        fresh=(*table.fresh, *fresh),
    )


LM_HEAD, SCORE, ANSWERS = r"^lm_head\.", r"^score\.", r"^qa_outputs\."


def bare(config: Config, spec: DecoderSpec) -> BareModel:
    """The decoder without a head."""
    return BareModel(config, Decoder(spec), table=table_of(spec, drop=(LM_HEAD, SCORE, ANSWERS)))


def sequence_classifier(config: Config, spec: DecoderSpec) -> SequenceClassifier:
    """The decoder with `score` over each text's last token."""
    table = table_of(spec, drop=(LM_HEAD,), fresh=(SCORE,))
    return SequenceClassifier(config, Decoder(spec), table=table)


def token_classifier(config: Config, spec: DecoderSpec) -> TokenClassifier:
    """The decoder with `score` over each token."""
    table = table_of(spec, drop=(LM_HEAD,), fresh=(SCORE,))
    return TokenClassifier(config, Decoder(spec), table=table, bias=True)


def question_answerer(config: Config, spec: DecoderSpec) -> QuestionAnswerer:
    """The decoder, under the family's name for it here, with `qa_outputs` over each token."""
    table = table_of(spec, drop=(LM_HEAD, SCORE), fresh=(ANSWERS,))
    if spec.answers != "model":  # files of the causal model are read too
        old = (*table.old, Rename("^model", spec.answers))
        table = replace(table, prefix=f"{spec.answers}.", old=old)
    return QuestionAnswerer(config, Decoder(spec), table=table, home=spec.answers)


# Task name → the model of a Llama-shaped family, made of its configuration and spec.
DECODER_MODELS: dict[str, Callable[[Config, DecoderSpec], Model]] = {
    "base": bare,
    "causal-lm": CausalDecoder,
    "sequence-classification": sequence_classifier,
    "token-classification": token_classifier,
    "question-answering": question_answerer,
}
