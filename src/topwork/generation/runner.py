"""One step of the engine: some new tokens of several texts, through any model.

A runner takes pieces of texts whose pages are ready, and gives the logits after each piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from topwork import ops
from topwork.nn.paged import PagedRows, PagePool

NO_ADAPTER = "__base__"


@dataclass
class Piece:
    """New `ids` of one text behind the `start` tokens that its `pages` hold already."""

    ids: list[int]
    start: int
    pages: list[int]
    adapter: str | None = None


class Runner(Protocol):
    pool: PagePool

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [pieces, V] fp32 after each piece's last id."""
        ...


class ModuleRunner:
    """Runs the model's own modules: single tokens as one batch, longer pieces one by one."""

    def __init__(self, model: Any, pool: PagePool) -> None:
        self.model = model
        self.pool = pool

    def run(self, pieces: Sequence[Piece]) -> Tensor:
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
        with self._adapters([p.adapter for p in pieces]):
            hidden = self.model.trunk(
                ids, positions=positions, layout=ops.Layout(None, rows.length, keep), cache=rows
            )
            return self.model.head(hidden[:, -1]).float()

    def _adapters(self, names: list[str | None]) -> Any:
        by_row = getattr(self.model, "rows_by_adapter", None)
        if by_row is None:
            return nullcontext()
        return by_row([name or NO_ADAPTER for name in names])
