"""One encoder for the families of BERT, built from a spec: embeddings, blocks, final norm.

x = norm(words(ids) + places(positions) + kinds(types))
for each block:   x = block(x)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.base import Model
from topwork.models.config import Config
from topwork.models.output import Output
from topwork.models.packing import Padding, check_lengths, packed_positions
from topwork.models.pooling import first_tokens
from topwork.models.states import block_inputs, hidden_states, refuse_attentions
from topwork.nn.layers import activated, linears
from topwork.nn.paths import part, place
from topwork.ops.cross import cross_attention
from topwork.ops.recompute import recomputed

Pair = tuple[Tensor, Tensor]


class Relation(Protocol):
    """What all blocks share: relative positions, angles."""

    def place(self, encoder: nn.Module) -> None:
        """Put its parameters into the encoder."""

    def shared(self, encoder: nn.Module, positions: Tensor, longest: int, like: Tensor) -> Any:
        """What each block gets, for texts of at most `longest` tokens; `like` gives the dtype."""


@dataclass(frozen=True)
class EmbeddingSpec:
    """What a token is turned into: words, positions (context 0: none), types (0: none).

    `first` is the row of the first position. `inner` projects before the norm, `outer` after it.
    """

    vocab: int
    size: int
    context: int = 0
    types: int = 0
    first: int = 0
    word: str = "embeddings.word_embeddings"
    norm: str = "embeddings.LayerNorm"
    norm_size: int | None = None
    norm_bias: bool = True
    inner: str | None = None
    outer: str | None = None


POSITIONS = "embeddings.position_embeddings"
TYPES = "embeddings.token_type_embeddings"


@dataclass(frozen=True)
class EncoderSpec:
    """A whole encoder. `order`: the paths of the blocks as they are run (a path may come again)."""

    hidden: int
    eps: float
    dropout: float
    embedding: EmbeddingSpec
    order: tuple[str, ...]
    block: Callable[[int], nn.Module]
    relation: Relation | None = None
    final_norm: str | None = None
    pooler: str | None = None


@dataclass(frozen=True)
class BlockNames:
    """Where the eight parts of a block stand in the checkpoint."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm: str = "output.LayerNorm"


@dataclass(frozen=True)
class PostNormSpec:
    """A block that normalises after each addition.

    `dropouts`: of the probabilities, of what attention adds, of what the feed-forward part adds.
    """

    hidden: int
    heads: int
    head_dim: int
    width: int
    activation: str
    eps: float
    dropouts: tuple[float, float, float]
    names: BlockNames = BlockNames()


class PostNormBlock(nn.Module):
    """x = norm(x + attention(x));   x = norm(x + down(act(up(x))))."""

    def __init__(self, spec: PostNormSpec) -> None:
        super().__init__()
        self.spec = spec
        names, wide = spec.names, spec.heads * spec.head_dim
        for path in (names.query, names.key, names.value):
            place(self, path, nn.Linear(spec.hidden, wide))
        place(self, names.out, nn.Linear(wide, spec.hidden))
        place(self, names.attention_norm, nn.LayerNorm(spec.hidden, spec.eps))
        place(self, names.up, nn.Linear(spec.hidden, spec.width))
        place(self, names.down, nn.Linear(spec.width, spec.hidden))
        place(self, names.norm, nn.LayerNorm(spec.hidden, spec.eps))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared: Any, layout: ops.Layout) -> Tensor:
        """q, k, v [B, T, H, D] → [B, T, H, D]; `shared`: score terms, or None."""
        rule = self.rule(self.spec.head_dim**-0.5)
        return ops.attention(q, k, v, layout, rule, shared or ops.ScoreTerms())

    def rule(self, scale: float) -> ops.Rule:
        """Every token sees all of its text; in training some probabilities are dropped."""
        return ops.Rule(scale, False, dropout=self.spec.dropouts[0] if self.training else 0.0)

    def forward(
        self, x: Tensor, shared: Any, layout: ops.Layout, prefix: Pair | None = None
    ) -> Tensor:
        spec, names = self.spec, self.spec.names
        parts = [part(self, path) for path in (names.query, names.key, names.value)]
        q, k, v = (y.unflatten(-1, (spec.heads, -1)) for y in linears(x, parts))
        if prefix is None:
            y = self.attend(q, k, v, shared, layout).flatten(2)
        else:
            y = after_prefix(q, k, v, prefix, layout).flatten(2)
        y = linears(y, (part(self, names.out),))[0]
        x = part(self, names.attention_norm)(x + F.dropout(y, spec.dropouts[1], self.training))
        y = activated(x, part(self, names.up), spec.activation)
        y = linears(y, (part(self, names.down),))[0]
        return part(self, names.norm)(x + F.dropout(y, spec.dropouts[2], self.training))


def after_prefix(q: Tensor, k: Tensor, v: Tensor, prefix: Pair, layout: ops.Layout) -> Tensor:
    """Attention of q, k, v [B, T, H, D] where keys and values [texts, n, H, D] stand before those
    of each text."""
    scale, virtual = q.shape[-1] ** -0.5, prefix[0].shape[1]
    if layout.lengths is None:
        k, v = (torch.cat([made.to(t.dtype), t], 1) for made, t in zip(prefix, (k, v)))
        return cross_attention(q, k, v, scale)
    lengths = list(layout.documents)
    whole = []
    for made, values in zip(prefix, (k, v)):
        pairs = zip(made.to(values.dtype), values[0].split(lengths))
        whole.append(torch.cat([piece for pair in pairs for piece in pair])[None])
    pairs = tuple((n, virtual + n) for n in lengths)
    return cross_attention(q, whole[0], whole[1], scale, pairs)


@dataclass
class EncoderOutput(Output):
    """`last_hidden_state` [B, T, C]; `pooler_output` [B, C] where the family has a pooler;
    `hidden_states`, when asked for: what each block was given, and the last."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Encoder(Model):
    """Token ids to hidden states, every token seeing all of its text."""

    def __init__(self, config: Config, spec: EncoderSpec, pooled: bool = True) -> None:
        super().__init__(config)
        self.spec = spec
        self.checkpointing = False
        self._prefix: list[Pair] | None = None
        e = spec.embedding
        place(self, e.word, nn.Embedding(e.vocab, e.size))
        if e.context:
            place(self, POSITIONS, nn.Embedding(e.context, e.size))
        if e.types:
            place(self, TYPES, nn.Embedding(e.types, e.size))
        if e.inner:
            place(self, e.inner, nn.Linear(e.size, spec.hidden, bias=False))
        place(self, e.norm, nn.LayerNorm(e.norm_size or e.size, spec.eps, bias=e.norm_bias))
        if e.outer:
            place(self, e.outer, nn.Linear(e.size, spec.hidden))
        for i, path in enumerate(dict.fromkeys(spec.order)):
            place(self, path, spec.block(i))
        if spec.relation is not None:
            spec.relation.place(self)
        if spec.final_norm:
            place(self, spec.final_norm, nn.LayerNorm(spec.hidden, spec.eps, bias=e.norm_bias))
        self.pooled = pooled and spec.pooler is not None
        if self.pooled:
            place(self, str(spec.pooler), nn.Linear(spec.hidden, spec.hidden))

    @property
    def trunk(self) -> Encoder:
        return self

    @property
    def block_list(self) -> list[nn.Module]:
        return [part(self, path) for path in self.spec.order]

    def get_input_embeddings(self) -> nn.Module:
        return part(self, self.spec.embedding.word)

    @contextmanager
    def behind(self, prefix: list[Pair]) -> Iterator[None]:
        """Within it keys and values [texts, n, H, D] of each block stand before every text's."""
        blocks = {type(part(self, path)) for path in self.spec.order}
        if blocks != {PostNormBlock} or self.spec.relation is not None:
            raise ConfigError(f"a prefix does not go to {self.config.model_type}")
        self._prefix = prefix
        try:
            yield
        finally:
            self._prefix = None

    def embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        types: Tensor | None,
        positions: Tensor,
    ) -> Tensor:
        """ids [B, T] or embeddings [B, T, E], types and `positions` [B, T] → [B, T, C]."""
        e = self.spec.embedding
        x = part(self, e.word)(input_ids) if inputs_embeds is None else inputs_embeds
        if e.types:
            kinds = part(self, TYPES)
            x = x + (kinds.weight[0] if types is None else kinds(types))
        elif types is not None and bool(types.any()):
            raise ConfigError(
                f"token_type_ids: {self.config.model_type} does not tell the parts of a pair apart"
            )
        if e.context:
            x = x + part(self, POSITIONS)(positions + e.first)
        if e.inner:
            x = part(self, e.inner)(x)
        x = F.dropout(part(self, e.norm)(x), self.spec.dropout, self.training)
        return part(self, e.outer)(x) if e.outer else x

    def encode(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        positions: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Hidden states [B, T, C] of rows without padding, or of the texts packed in one row."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ConfigError("an encoder needs input_ids or inputs_embeds")
        batch, tokens = given.shape[:2]
        if lengths is not None:
            check_lengths(lengths, batch, tokens)
        longest = max(lengths) if lengths else tokens
        room = self.spec.embedding.context - self.spec.embedding.first
        if self.spec.embedding.context and longest > room and positions is None:
            raise ConfigError(
                f"a text of {longest} tokens is longer than the {room} positions of this "
                f"{self.config.model_type}; cut it with truncation=True, max_length={room}"
            )
        if positions is None:
            row = torch.arange(tokens, device=given.device)[None]
            positions = row if lengths is None else packed_positions(lengths, given.device)
            if self._prefix is not None:
                positions = positions + self._prefix[0][0].shape[1]
        x = self.embed(input_ids, inputs_embeds, token_type_ids, positions)
        relation, layout = self.spec.relation, ops.Layout(lengths)
        shared = relation.shared(self, positions, longest, x) if relation is not None else None
        for i, path in enumerate(self.spec.order):
            block = part(self, path)
            rest = (shared, layout) if self._prefix is None else (shared, layout, self._prefix[i])
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = recomputed(block, x, *rest)
            else:
                x = block(x, *rest)
        return part(self, self.spec.final_norm)(x) if self.spec.final_norm else x

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """Padded rows [B, T] with their mask, or texts packed in one row with their `lengths`."""
        refuse_attentions(output_attentions)
        rows, texts = unpadded(
            self, attention_mask, lengths, input_ids, token_type_ids, position_ids, inputs_embeds
        )
        with block_inputs(self, output_hidden_states) as found:
            hidden = self.encode(**texts)
        pooled = None
        if self.pooled:
            pooled = part(self, str(self.spec.pooler))(
                first_tokens(hidden, texts["lengths"])
            ).tanh()
        whole = hidden if rows is None else rows.unpack(hidden)
        states = hidden_states(found, whole, attention_mask) if output_hidden_states else None
        return EncoderOutput(whole, pooled, states)


def unpadded(
    encoder: Encoder,
    attention_mask: Tensor | None,
    lengths: tuple[int, ...] | None,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[Padding | None, dict[str, Any]]:
    """The call's rows as arguments of `encode`: packed, with their `Padding`, where any is."""
    if position_ids is not None:  # as the table counts them
        position_ids = position_ids - encoder.spec.embedding.first
    texts: dict[str, Any] = {
        "input_ids": input_ids,
        "token_type_ids": token_type_ids,
        "positions": position_ids,
        "inputs_embeds": inputs_embeds,
    }
    if lengths is not None or attention_mask is None or bool(attention_mask.all()):
        return None, {**texts, "lengths": lengths}
    rows = Padding.of(attention_mask)
    if len(rows.lengths) != len(attention_mask):
        empty = (~rows.keep.any(1)).nonzero().flatten().tolist()
        raise ConfigError(f"attention_mask marks every token of row {empty[0]} as padding")
    packed = {k: None if v is None else rows.pack(v) for k, v in texts.items()}
    return rows, {**packed, "lengths": rows.lengths}
