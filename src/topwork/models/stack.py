"""The two stacks of an encoder-decoder, built from a spec: embeddings, blocks, final norm.

for each block:   x = x + attention(x);   x = x + cross(x, memory);   x = x + feed(x)
with a norm before each part, or after each addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.nn.cache import KVCache
from topwork.nn.layers import ACTIVATIONS, linears
from topwork.nn.norms import NormSpec
from topwork.nn.paths import part, place
from topwork.nn.relative import relative_bias
from topwork.ops.cross import cross_attention
from topwork.ops.recompute import recomputed


@dataclass(frozen=True)
class StackNames:
    """Where the parts stand in the checkpoint; `projections`: those of q, k, v and the output."""

    blocks: str = "layers"
    attention: str = "self_attn"
    attention_norm: str = "self_attn_layer_norm"
    cross: str = "encoder_attn"
    cross_norm: str = "encoder_attn_layer_norm"
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "out_proj")
    up: str = "fc1"
    gate: str | None = None
    down: str = "fc2"
    norm: str = "final_layer_norm"
    embedding_norm: str | None = None
    final_norm: str | None = None
    words: str = "embed_tokens"
    positions: str = "embed_positions"


@dataclass(frozen=True)
class StackSpec:
    """One stack. `gate` in the names: feed is down(act(gate x) · up x), else down(act(up x)).

    `vocab` 0: there is no table of words, the stack is given embeddings. `places` makes the
    embedding of positions; `relative` is (buckets, longest distance) of a learned bias that the
    first block holds for all. `scale` of the scores, `embedding_scale` of the words. `key_bias`:
    whether keys have a bias where the other linears do. `crossed`: it looks at a memory, of size
    `memory` where that is another; `ahead`: its tokens see those behind them nevertheless.
    In training: `dropout` of what enters and of what each part adds, `attention_dropout` of the
    probabilities, `inner_dropout` within the feed-forward part, and `layer_drop`, how often a whole
    block is left out (arXiv:1909.11556).
    """

    vocab: int
    hidden: int
    heads: int
    head_dim: int
    width: int
    count: int
    activation: str
    norm: NormSpec
    scale: float
    bias: bool
    norm_first: bool
    names: StackNames
    crossed: bool = False
    context: int = 0
    places: Callable[[], nn.Module] | None = None
    relative: tuple[int, int] | None = None
    embedding_scale: float = 1.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    inner_dropout: float = 0.0
    key_bias: bool = True
    layer_drop: float = 0.0
    memory: int | None = None
    ahead: bool = False

    @property
    def causal(self) -> bool:
        return self.crossed and not self.ahead

    @property
    def relative_path(self) -> str:
        return f"{self.names.blocks}.0.{self.names.attention}.relative_attention_bias"


@dataclass
class Memory:
    """What the decoder looks at: the encoder's states [B, S, C], or packed in one row."""

    hidden: Tensor
    lengths: tuple[int, ...] | None = None


class DecoderCache(KVCache):
    """The decoder's own keys and values, and those of the texts, which stay as they are.

    `texts`: per layer k, v [N, S, H, D]; `told` [N, S] is False where a text is padding; `owner`
    [B]: which text a row looks at. `virtual`: how many keys stand before those of the tokens, which
    `length` does not count. `origin` [B, room] int32: the row whose stores hold a row's key at each
    place, so that rows change places without a copy; None: its own.
    """

    def __init__(self, texts: list[tuple[Tensor, Tensor]], told: Tensor | None) -> None:
        super().__init__(len(texts))
        self.texts, self.told = texts, told
        self.bias: Tensor | None = None
        self.virtual = 0
        self.owner = torch.arange(len(texts[0][0]) if texts else 0)
        self.origin: Tensor | None = None
        self._each: tuple[list[tuple[Tensor, Tensor]], Tensor | None] | None = texts, told

    def begin(self, pairs: list[tuple[Tensor, Tensor]]) -> DecoderCache:
        """Itself, beginning with these keys and values [B, n, H, D] of each layer."""
        for layer, (k, v) in enumerate(pairs[: len(self.stores)]):
            self.update(layer, k, v)
        self.virtual = pairs[0][0].shape[1]
        return self

    @property
    def length(self) -> int:
        return super().length - self.virtual

    @property
    def memory(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's k, v [B, S, H, D] of the rows' texts."""
        return self._by_rows()[0]

    @property
    def keep(self) -> Tensor | None:
        """[B, S], False where a row's text is padding."""
        return self._by_rows()[1]

    def _by_rows(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        if self._each is None:
            where = self.owner.to(self.texts[0][0].device)
            told = None if self.told is None else self.told[where]
            self._each = [(k[where], v[where]) for k, v in self.texts], told
        return self._each

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.settle()
        return super().update(layer, k, v)

    def settle(self) -> None:
        """Let each row's keys lie in its own stores."""
        origin, self.origin = self.origin, None
        at = torch.arange(super().length)
        if origin is None or bool(
            (origin[:, : len(at)] == torch.arange(len(origin))[:, None]).all()
        ):
            return
        rows = origin[:, : len(at)].long()
        for store in self.stores:
            for held in store.buffers:  # type: ignore[attr-defined]
                held[:, : len(at)] = held[rows, at]

    def crop(self, length: int) -> None:
        super().crop(length + self.virtual)

    def select(self, rows: Tensor) -> None:
        if self.origin is not None and len(rows) == len(self.origin):
            held = self.origin[:, : super().length]
            held.copy_(held[rows])
        else:
            self.settle()
            super().select(rows)
        self._take(rows.cpu())

    def spread(self, batch: int) -> None:
        """Let there be `batch` rows, as many for each text."""
        copies, rest = divmod(batch, len(self.owner))
        if copies > 1 and not rest:
            rows = torch.arange(len(self.owner)).repeat_interleave(copies)
            if self.virtual:
                self.settle()
                super().select(rows)
            self._take(rows)

    def _take(self, rows: Tensor) -> None:
        owner = self.owner[rows]
        if len(owner) == len(self.owner) and torch.equal(owner, self.owner):
            return  # beams of one text changed places: they look at the same memory
        self.owner, self._each = owner, None


class Heads(nn.Module):
    """The four linears of an attention."""

    def __init__(self, spec: StackSpec, memory: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        wide = spec.heads * spec.head_dim
        q, k, v, out = spec.names.projections
        for name in (k, v, q):
            bias = spec.bias and (spec.key_bias or name != k)
            read = spec.hidden if name == q or memory is None else memory
            place(self, name, nn.Linear(read, wide, bias=bias))
        place(self, out, nn.Linear(wide, spec.hidden, bias=spec.bias))

    def project(self, x: Tensor, which: str) -> tuple[Tensor, ...]:
        """x [B, T, C] → those of q, k, v that `which` names, each [B, T, H, D]."""
        parts = [part(self, self.spec.names.projections["qkv".index(w)]) for w in which]
        return tuple(y.unflatten(-1, (self.spec.heads, -1)) for y in linears(x, parts))

    def out(self, y: Tensor) -> Tensor:
        return linears(y.flatten(2), (part(self, self.spec.names.projections[3]),))[0]


class StackBlock(nn.Module):
    """Self-attention, in a decoder cross-attention, and the feed-forward part."""

    def __init__(self, spec: StackSpec, index: int) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        names = spec.names
        place(self, names.attention, Heads(spec))
        place(self, names.attention_norm, spec.norm.build(spec.hidden))
        if spec.crossed:
            place(self, names.cross, Heads(spec, spec.memory))
            place(self, names.cross_norm, spec.norm.build(spec.hidden))
        for path in (names.up, names.gate):
            if path is not None:
                place(self, path, nn.Linear(spec.hidden, spec.width, bias=spec.bias))
        place(self, names.down, nn.Linear(spec.width, spec.hidden, bias=spec.bias))
        place(self, names.norm, spec.norm.build(spec.hidden))

    def forward(
        self,
        x: Tensor,
        layout: ops.Layout,
        terms: ops.ScoreTerms,
        memory: Memory | None,
        cache: DecoderCache | None,
    ) -> Tensor:
        names = self.spec.names
        x = self._add(x, names.attention_norm, lambda y: self._look(y, layout, terms, cache))
        if self.spec.crossed:
            x = self._add(x, names.cross_norm, lambda y: self._cross(y, layout, memory, cache))
        return self._add(x, names.norm, self._feed)

    def _add(self, x: Tensor, norm: str, run: Callable[[Tensor], Tensor]) -> Tensor:
        drop, training = self.spec.dropout, self.training
        if self.spec.norm_first:
            return x + F.dropout(run(part(self, norm)(x)), drop, training)
        return part(self, norm)(x + F.dropout(run(x), drop, training))

    @property
    def _attention_drop(self) -> float:
        return self.spec.attention_dropout if self.training else 0.0

    def _look(
        self, x: Tensor, layout: ops.Layout, terms: ops.ScoreTerms, cache: DecoderCache | None
    ) -> Tensor:
        heads = part(self, self.spec.names.attention)
        q, k, v = heads.project(x, "qkv")
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        rule = ops.Rule(self.spec.scale, causal=self.spec.causal, dropout=self._attention_drop)
        return heads.out(ops.attention(q, k, v, layout, rule, terms))

    def _cross(
        self, x: Tensor, layout: ops.Layout, memory: Memory | None, cache: DecoderCache | None
    ) -> Tensor:
        heads, scale = part(self, self.spec.names.cross), self.spec.scale
        (q,) = heads.project(x, "q")
        if cache is not None:
            k, v = cache.memory[self.index]
            return heads.out(
                cross_attention(q, k, v, scale, keep=cache.keep, dropout=self._attention_drop)
            )
        assert memory is not None
        k, v = heads.project(memory.hidden, "kv")
        pairs = None
        if layout.lengths is not None and memory.lengths is not None:
            pairs = tuple(zip(layout.documents, memory.lengths))
        return heads.out(cross_attention(q, k, v, scale, pairs, dropout=self._attention_drop))

    def looks(self, x: Tensor, memory: Tensor) -> Tensor:
        """How much each token of whole texts x [B, T, C] looks at each state [B, H, T, S], fp32."""
        names, scale = self.spec.names, self.spec.scale
        layout, terms = ops.Layout(), ops.ScoreTerms()
        x = self._add(x, names.attention_norm, lambda y: self._look(y, layout, terms, None))
        x = part(self, names.cross_norm)(x) if self.spec.norm_first else x
        heads = part(self, names.cross)
        (q,), (k,) = heads.project(x, "q"), heads.project(memory, "k")
        return (torch.einsum("bthd,bshd->bhts", q, k) * scale).float().softmax(-1)

    def _feed(self, x: Tensor) -> Tensor:
        spec, names = self.spec, self.spec.names
        act = ACTIVATIONS[spec.activation]
        if names.gate is None:
            inner = act(linears(x, (part(self, names.up),))[0])
        else:
            gate, up = linears(x, (part(self, names.gate), part(self, names.up)))
            inner = act(gate) * up
        inner = F.dropout(inner, spec.inner_dropout, self.training)
        return linears(inner, (part(self, names.down),))[0]


class Stack(nn.Module):
    """Token ids to hidden states; with `crossed` a decoder that looks at a memory."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpointing = False
        if spec.vocab:
            place(self, spec.names.words, nn.Embedding(spec.vocab, spec.hidden))
        if spec.places is not None:
            place(self, spec.names.positions, spec.places())
        for i in range(spec.count):
            place(self, f"{spec.names.blocks}.{i}", StackBlock(spec, i))
        if spec.relative is not None:
            place(self, spec.relative_path, nn.Embedding(spec.relative[0], spec.heads))
        for path in (spec.names.embedding_norm, spec.names.final_norm):
            if path is not None:
                place(self, path, spec.norm.build(spec.hidden))

    @property
    def blocks(self) -> Any:
        return part(self, self.spec.names.blocks)

    def remember(self, memory: Tensor) -> list[tuple[Tensor, ...]]:
        """Each layer's keys and values [..., H, D] of a memory [..., C]."""
        return [part(block, self.spec.names.cross).project(memory, "kv") for block in self.blocks]

    def terms(self, longest: int, cache: DecoderCache | None) -> ops.ScoreTerms:
        """The bias by distance of up to `longest` tokens, where there is one."""
        if self.spec.relative is None:
            return ops.ScoreTerms()
        table, far = part(self, self.spec.relative_path).weight, self.spec.relative[1]
        sides = not self.spec.crossed
        if cache is None:
            return ops.ScoreTerms(bias=relative_bias(table, longest, longest, far, sides))
        if cache.bias is None or cache.bias.shape[1] < longest:
            room = max(64, 2 * longest)
            cache.bias = relative_bias(table, room, room, far, sides)
        return ops.ScoreTerms(bias=cache.bias)

    def forward(
        self,
        input_ids: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor,
        longest: int,
        layout: ops.Layout,
        memory: Memory | None = None,
        cache: DecoderCache | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """ids [B, T] or embeddings [B, T, C] at `positions` [B, T] → hidden [B, T, C].

        `states` is filled with what each block is given.
        """
        spec = self.spec
        x = part(self, spec.names.words)(input_ids) if inputs_embeds is None else inputs_embeds
        if spec.embedding_scale != 1 and inputs_embeds is None:
            x = x * spec.embedding_scale
        if spec.places is not None:
            x = x + part(self, spec.names.positions)(positions).to(x.dtype)
        if spec.names.embedding_norm is not None:
            x = part(self, spec.names.embedding_norm)(x)
        x = F.dropout(x, spec.dropout, self.training)
        terms = self.terms(longest, cache)
        skip = spec.layer_drop if self.training else 0.0
        for block in self.blocks:
            if states is not None:
                states.append(x)
            if skip and float(torch.rand(())) < skip:
                continue
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = recomputed(block, x, layout, terms, memory, cache)
            else:
                x = block(x, layout, terms, memory, cache)
        if spec.names.final_norm is not None:
            x = part(self, spec.names.final_norm)(x)
            x = F.dropout(x, spec.dropout, self.training) if spec.relative is not None else x
        return x
