"""One step of the engine: some new tokens of several texts, through any model.

A runner takes pieces of texts whose pages are ready, and gives the logits after each piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from topwork import ops
from topwork.errors import ConfigError
from topwork.generation.program import StepProgram, compile_step
from topwork.nn.mamba import RecurrentStore
from topwork.nn.paged import PagedRows, PagePool
from topwork.ops.native.decode import MOST_ROWS

NO_ADAPTER = "__base__"


@dataclass
class Piece:
    """New `ids` of one text behind the `start` tokens that its `pages` hold already."""

    ids: list[int]
    start: int
    pages: list[int]
    adapter: str | None = None


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
    """Runs the model's own modules: single tokens as one batch, longer pieces one by one."""

    def __init__(self, model: Any, pool: PagePool) -> None:
        self.model = model
        self.pool = pool

    def refresh(self) -> None:
        """The modules are read at each step."""

    def run(self, pieces: Sequence[Piece]) -> Next:
        was_training = self.model.training
        self.model.eval()
        try:
            return Next.of(self._logits(pieces))
        finally:
            self.model.train(was_training)

    def _logits(self, pieces: Sequence[Piece]) -> Tensor:
        groups: list[list[int]] = [[i for i, p in enumerate(pieces) if len(p.ids) == 1]]
        groups += [[i] for i, p in enumerate(pieces) if len(p.ids) > 1]
        logits: list[Tensor | None] = [None] * len(pieces)
        for group in groups:
            if group:
                found = self._batch([pieces[i] for i in group])
                for i, row in zip(group, found):
                    logits[i] = row
        return torch.stack([row for row in logits if row is not None])

    def _batch(self, pieces: Sequence[Piece]) -> Tensor:
        """Pieces of one length [B, T] → [B, V]."""
        ids = torch.tensor([p.ids for p in pieces])
        starts = torch.tensor([p.start for p in pieces])
        positions = starts[:, None] + torch.arange(ids.shape[1])
        rows = PagedRows(self.pool, [p.pages for p in pieces], starts.tolist(), ids.shape[1])
        keep = None if bool(rows.keep.all()) else rows.keep
        return self._after(pieces, ids, positions, ops.Layout(None, rows.length, keep), rows)

    def _after(
        self,
        pieces: Sequence[Piece],
        ids: Tensor,
        positions: Tensor,
        layout: ops.Layout,
        cache: Any,
    ) -> Tensor:
        with self._adapters([p.adapter for p in pieces]):
            hidden = self.model.trunk(ids, positions=positions, layout=layout, cache=cache)
            return self.model.head(hidden[:, -1]).float()

    def _adapters(self, names: list[str | None]) -> Any:
        by_row = getattr(self.model, "rows_by_adapter", None)
        if by_row is None:
            return nullcontext()
        return by_row([name or NO_ADAPTER for name in names])


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

    def _batch(self, pieces: Sequence[Piece]) -> Tensor:
        ids = torch.tensor([p.ids for p in pieces])
        starts = torch.tensor([p.start for p in pieces])[:, None]
        pages = torch.tensor([p.pages[0] for p in pieces])
        past, new = int(starts.max()), ids.shape[1]
        keep = torch.arange(past + new) >= past - starts  # rows are aligned at their ends
        cache = self.model.new_cache()
        for store, held in zip(cache.stores, self._held):
            store.length = past
            if held is not None:  # what a page held of another text is forgotten
                old = (starts > 0)[..., None]
                store.inputs, store.state = (t[pages] * old for t in held)
        layout = ops.Layout(None, past, None if bool(keep.all()) else keep)
        logits = self._after(pieces, ids, starts + torch.arange(new), layout, cache)
        self._made.append((pages, [(store.inputs, store.state) for store in cache.stores]))
        return logits


class NativeRunner:
    """Runs all new tokens as rows of one native program, each bitwise as it would be alone.

    Models (or adapters) that the program has no words for go through `ModuleRunner`.
    """

    def __init__(self, model: Any, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self._modules = ModuleRunner(model, pool)
        self._step: StepProgram | None = None
        self._adapters: list[str] = []
        self.refresh()

    @property
    def native(self) -> bool:
        return self._step is not None

    def refresh(self) -> None:
        """Read the model again: its weights or adapters have changed."""
        self._adapters = list(getattr(self.model, "peft_config", {}))
        length = self.pool.pages * self.pool.size  # a text may outgrow the trained context
        step = None
        if self.pool.size % 16 == 0:
            step = compile_step(self.model, MOST_ROWS, length, self._adapters, steady=True)
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
        # Rows of one adapter side by side share its tiles.
        index = {name: i for i, name in enumerate(self._adapters)}
        for piece in pieces:
            if piece.adapter is not None and piece.adapter not in index:
                raise ConfigError(f"the adapter {piece.adapter!r} is no longer there")
        order = sorted(range(len(pieces)), key=lambda i: index.get(pieces[i].adapter or "", -1))
        back = torch.tensor(order).argsort()
        found = self._in_groups([pieces[i] for i in order])
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
        index = {name: i for i, name in enumerate(self._adapters)}
        adapter = torch.tensor([index.get(p.adapter or "", -1) for p in pieces], dtype=torch.int32)
        step, count = self._step, len(pieces)
        logits = step.run(
            ids,
            starts.repeat_interleave(counts) + offsets,
            pages.repeat_interleave(counts, 0),
            adapter=adapter.repeat_interleave(counts) if self._adapters else None,
            wanted=(ends - 1).to(torch.int32),
        )
        # The next group of rows goes into the same buffers.
        return Next(logits.clone(), step.peak[:count].clone(), step.best[:count].long())
