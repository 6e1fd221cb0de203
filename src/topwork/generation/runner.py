"""One step of the engine: some new tokens of several texts, through any model.

A runner takes pieces of texts whose pages are ready, and gives the logits after each piece.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from topwork import ops
from topwork.generation.program import StepProgram, compile_step
from topwork.nn.mamba import RecurrentStore
from topwork.nn.paged import PagedRows, PagePool
from topwork.ops.native.decode import MOST_ROWS
from topwork.peft.acting import Acting, apart, low_rank, virtual_tokens, within
from topwork.peft.targets import is_wrapper

NOTHING = Acting()


@dataclass
class Piece:
    """New `ids` of one text behind the `start` tokens that its `pages` hold already; `bare`: the
    pages of its first pass, if it is read twice. Virtual tokens are pieces of their own."""

    ids: list[int]
    start: int
    pages: list[int]
    acting: Acting = NOTHING
    bare: list[int] = field(default_factory=list)

    @property
    def is_virtual(self) -> bool:
        return self.start < self.acting.lead

    def parts(self) -> list[list[Piece]]:
        """Its tokens before the adapter's own, which must see nothing of it, and the others."""
        before = self.acting.own - self.start
        if not 0 < before < len(self.ids):
            return [[self]]
        first = replace(self, ids=self.ids[:before], acting=NOTHING)
        rest = replace(self, ids=self.ids[before:], start=self.start + before)
        return [[first], [rest]]


@dataclass
class Next:
    """What may follow N pieces: `logits` [N, V] in any dtype, the largest's values and ids [N]."""

    logits: Tensor
    peak: Tensor
    best: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Next:
        return cls(logits, *logits.max(-1))

    @classmethod
    def joined(cls, parts: Sequence[Next]) -> Next:
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


class Runner(Protocol):
    pool: PagePool

    def run(self, pieces: Sequence[Piece]) -> Next:
        """What follows each piece's last id. Where it raises, the pieces can be run again."""
        ...

    def refresh(self) -> None:
        """The model's weights or adapters have changed."""
        ...


class ModuleRunner:
    """Runs the model's own modules: single tokens as one batch, longer pieces one by one.

    Adapters that change what all rows go through have batches of their own.
    """

    def __init__(self, model: Any, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self.refresh()

    def refresh(self) -> None:
        """The modules are read at each step; here, which adapters cannot share one."""
        self._apart = apart(self.model)

    def run(self, pieces: Sequence[Piece]) -> Next:
        was_training = self.model.training
        self.model.eval()
        try:
            return Next.of(self._logits(pieces))
        finally:
            self.model.train(was_training)

    def _logits(self, pieces: Sequence[Piece]) -> Tensor:
        groups: dict[Hashable, list[int]] = {}
        for i, piece in enumerate(pieces):
            name = piece.acting.adapter
            single = len(piece.ids) == 1 and not piece.is_virtual
            shared = (name,) if name in self._apart else ()
            groups.setdefault(shared if single else i, []).append(i)
        logits: list[Tensor | None] = [None] * len(pieces)
        for group in groups.values():
            parts = pieces[group[0]].parts() if len(group) == 1 else [[pieces[i] for i in group]]
            for i, row in zip(group, [self._batch(part) for part in parts][-1]):
                logits[i] = row
        return torch.stack([row for row in logits if row is not None])

    def _batch(self, pieces: Sequence[Piece]) -> Tensor:
        """Pieces of one length [B, T] → [B, V]."""
        virtual = None
        if pieces[0].is_virtual:
            virtual = virtual_tokens(self.model, pieces[0].acting)
            if isinstance(virtual, list):
                return self._stored(pieces[0], virtual)
        twice = [piece for piece in pieces if piece.acting.twice]
        bare = None
        if twice:
            bare = self._hidden([replace(p, acting=NOTHING, pages=p.bare) for p in twice])
        last = self._hidden(pieces, bare, virtual)[:, -1:]
        if not is_wrapper(self.model.get_output_embeddings()):
            return self.model.head(last[:, 0]).float()
        ends = torch.tensor([[p.start + len(p.ids) - 1] for p in pieces])
        with self._adapters(pieces, ends, None if bare is None else bare[:, -1:]):
            return self.model.head(last)[:, 0].float()

    def _adapters(self, pieces: Sequence[Piece], positions: Tensor, bare: Tensor | None) -> Any:
        rows = [p.acting for p in pieces]
        return within(self.model, rows, positions, bare, rows[0].adapter not in self._apart)

    def _stored(self, piece: Piece, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Put a prefix's keys and values where the piece lies; nothing follows it [1, V]."""
        stop = piece.start + len(piece.ids)
        rows = PagedRows(self.pool, [piece.pages], [piece.start], len(piece.ids))
        for layer, (k, v) in enumerate(layers):
            rows.update(layer, k[:, piece.start : stop], v[:, piece.start : stop])
        return torch.zeros(1, self.model.config.vocab_size)

    def _hidden(
        self, pieces: Sequence[Piece], bare: Tensor | None = None, virtual: Tensor | None = None
    ) -> Tensor:
        """[B, T, C]; `bare`: of the first pass, for those that are read twice; `virtual`
        [1, lead, C]: the embeddings of virtual tokens."""
        starts, new = [p.start for p in pieces], len(pieces[0].ids)
        rows = PagedRows(self.pool, [p.pages for p in pieces], starts, new)
        keep = None if bool(rows.keep.all()) else rows.keep
        return self._through(pieces, ops.Layout(None, rows.length, keep), rows, bare, virtual)

    def _through(
        self,
        pieces: Sequence[Piece],
        layout: ops.Layout,
        cache: Any,
        bare: Tensor | None,
        virtual: Tensor | None,
    ) -> Tensor:
        starts = torch.tensor([p.start for p in pieces])[:, None]
        positions = starts + torch.arange(len(pieces[0].ids))
        ids = torch.tensor([p.ids for p in pieces]) if virtual is None else None
        embeds = None if virtual is None else virtual[:, positions[0]]
        with self._adapters(pieces, positions, bare):
            return self.model.trunk(
                ids, inputs_embeds=embeds, positions=positions, layout=layout, cache=cache
            )


def is_recurrent(model: Any) -> bool:
    """Whether what the model remembers of a text is a state, of one size for any length."""
    return all(type(store) is RecurrentStore for store in model.new_cache().stores)


class StateRunner(ModuleRunner):
    """Runs a recurrent model: each text has one page of the pool, which stands for its state."""

    def __init__(self, model: Any, rows: int) -> None:
        super().__init__(model, PagePool(model.layer_count, rows, 1 << 40))
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * model.layer_count
        self._made: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []

    def run(self, pieces: Sequence[Piece]) -> Next:
        self._made = []
        found = super().run(pieces)
        # A state that has read a piece cannot go back: it moves once nothing can fail any more.
        for pages, states in self._made:
            for layer, made in enumerate(states):
                held = self._held[layer]
                if held is None:
                    inputs, state = (t.new_zeros(self.pool.pages, *t.shape[1:]) for t in made)
                    held = inputs, state
                    self._held[layer] = held
                for to, value in zip(held, made):
                    to[pages] = value
        return found

    def _hidden(
        self, pieces: Sequence[Piece], bare: Tensor | None = None, virtual: Tensor | None = None
    ) -> Tensor:
        starts = torch.tensor([p.start for p in pieces])[:, None]
        pages = torch.tensor([p.pages[0] for p in pieces])
        past, new = int(starts.max()), len(pieces[0].ids)
        keep = torch.arange(past + new) >= past - starts  # rows are aligned at their ends
        cache = self.model.new_cache()
        for store, held in zip(cache.stores, self._held):
            store.length = past
            if held is not None:  # what a page held of another text is forgotten
                old = (starts > 0)[..., None]
                store.inputs, store.state = (torch.where(old, t[pages], 0) for t in held)
        layout = ops.Layout(None, past, None if bool(keep.all()) else keep)
        hidden = self._through(pieces, layout, cache, bare, virtual)
        self._made.append((pages, [(store.inputs, store.state) for store in cache.stores]))
        return hidden


class NativeRunner:
    """Runs all new tokens as rows of one native program, each bitwise as it would be alone.

    Models (or adapters) that the program has no words for go through `ModuleRunner`.
    """

    def __init__(self, model: Any, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self._modules = ModuleRunner(model, pool)
        self._step: StepProgram | None = None
        self._index: dict[str | None, int] = {}  # the program's numbers of adapters, and of none
        self.refresh()

    @property
    def native(self) -> bool:
        return self._step is not None

    def refresh(self) -> None:
        """Read the model again: its weights or adapters have changed."""
        self._modules.refresh()
        adapters = low_rank(self.model)
        self._index = {None: -1} | {name: i for i, name in enumerate(adapters or ())}
        length = self.pool.pages * self.pool.size  # a text may outgrow the trained context
        step = None
        if self.pool.size % 16 == 0:
            step = compile_step(self.model, MOST_ROWS, length, adapters, steady=True)
        if step is not None:
            for layer, (heads, size) in enumerate(step.shapes):
                like = torch.empty(heads, size, dtype=torch.bfloat16)
                self.pool.allocate(like, like, layer)
            step.bind(
                [t for t in self.pool.keys if t is not None],
                [t for t in self.pool.values if t is not None],
            )
        self._step = step

    def run(self, pieces: Sequence[Piece]) -> Next:
        if self._step is None:
            return self._modules.run(pieces)
        index = self._index
        rest = [i for i, p in enumerate(pieces) if p.is_virtual or p.acting.on_layers not in index]
        # Rows of one adapter side by side share its tiles.
        order = sorted(
            set(range(len(pieces))) - set(rest), key=lambda i: index[pieces[i].acting.on_layers]
        )
        parts = [self._in_groups([pieces[i] for i in order])] if order else []
        parts += [self._modules.run([pieces[i] for i in rest])] if rest else []
        back = torch.tensor([*order, *rest]).argsort()
        found = Next.joined(parts)
        return Next(found.logits[back], found.peak[back], found.best[back])

    def _in_groups(self, pieces: Sequence[Piece]) -> Next:
        """As many rows at once as the program takes."""
        found: list[Next] = []
        group: list[Piece] = []
        for piece in pieces:
            if group and sum(len(p.ids) for p in group) + len(piece.ids) > MOST_ROWS:
                found.append(self._rows(group))
                group = []
            group.append(piece)
        found.append(self._rows(group))
        return Next.joined(found)

    def _rows(self, pieces: Sequence[Piece]) -> Next:
        assert self._step is not None
        counts = torch.tensor([len(p.ids) for p in pieces])
        ends = counts.cumsum(0)
        ids = torch.tensor([i for p in pieces for i in p.ids])
        starts = torch.tensor([p.start for p in pieces])
        offsets = torch.arange(len(ids)) - (ends - counts).repeat_interleave(counts)
        longest = max(len(p.pages) for p in pieces)
        pages = torch.tensor(
            [[*p.pages, *[0] * (longest - len(p.pages))] for p in pieces], dtype=torch.int32
        )
        positions = starts.repeat_interleave(counts) + offsets
        adapter = torch.tensor([self._index[p.acting.on_layers] for p in pieces])
        acts = positions >= torch.tensor([p.acting.start for p in pieces]).repeat_interleave(counts)
        adapter = torch.where(acts, adapter.repeat_interleave(counts), -1).to(torch.int32)
        step, count = self._step, len(pieces)
        logits = step.run(
            ids,
            positions,
            pages.repeat_interleave(counts, 0),
            adapter=adapter if len(self._index) > 1 else None,
            wanted=(ends - 1).to(torch.int32),
        )
        # The next group of rows goes into the same buffers.
        return Next(logits.clone(), step.peak[:count].clone(), step.best[:count].long())
