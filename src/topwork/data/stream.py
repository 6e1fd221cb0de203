"""Samples of rows that are read while the run goes: data larger than memory, or without an end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from topwork.data.prepare import Prepared
from topwork.data.rows import Row
from topwork.errors import DataError

CHUNK = 1000  # rows that are tokenized, shuffled and packed together


class Stream(Sequence[Any]):
    """The first `size` samples of `rows`, made chunk by chunk; those gone by are forgotten.

    `prepare` makes a chunk of rows into samples and `group` into what the run counts as one (rows
    or packs). When the rows end they are read again from the start. With `seed` each chunk is in
    random order. Samples are asked for in order; an earlier one that is forgotten is found by
    reading from the start. DataError for rows that cannot be used, that end and cannot be read
    again, or of which a whole pass leaves no sample.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        size: int,
        prepare: Callable[[Sequence[Row]], Prepared],
        group: Callable[[Prepared], Sequence[Any]],
        seed: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self._rows, self._size, self._chunk = rows, size, chunk
        self._prepare, self._group, self._seed = prepare, group, seed
        self._restart()
        self._read()
        self.head = self._first
        """The first chunk, as the report before the run shows it."""
        self.known = len(self._kept)
        """Samples that can be looked at without reading on, from the first."""

    def _restart(self) -> None:
        self._chunks: Iterator[Prepared] = self._prepared()
        self._kept: list[Any] = []
        self._start = 0
        self.rows, self.kept, self.cut, self.passes = 0, 0, 0, 0
        self.dropped: Counter[str] = Counter()

    def _prepared(self) -> Iterator[Prepared]:
        while True:
            source, before = iter(self._rows), self.kept
            number = 0
            while rows := list(islice(source, self._chunk)):
                yield self._marked(rows, number)
                number += len(rows)
            self.passes += 1
            if self.kept == before:
                raise DataError(
                    f"the rows ended after {self.rows:,} of them, which made {self.kept:,} samples "
                    f"of the {self._size:,} that the run needs, and cannot be read again: pass "
                    "something that can (a file, a datasets.IterableDataset), or fewer max_steps"
                )

    def _marked(self, rows: list[Row], first: int) -> Prepared:
        """The samples of a chunk, by the numbers of their rows in the whole."""
        try:
            made = self._prepare(rows)
        except DataError as error:
            where = f"rows {first:,} to {first + len(rows) - 1:,}, numbered from there"
            raise DataError(f"{where}: {error}") from error
        samples = [replace(sample, row=first + sample.row) for sample in made.samples]
        if self._seed is not None:
            random.Random(f"{self._seed} {self.passes} {first}").shuffle(samples)
        return replace(made, samples=samples)

    def _read(self) -> None:
        """Make the next chunk's samples."""
        made = next(self._chunks)
        if not self.rows:
            self._first = made
        self.rows += made.rows
        self.kept += len(made)
        self.cut += made.cut
        self.dropped += made.dropped
        self._kept += self._group(made)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(index)
        if index < self._start:
            self._restart()
        while index >= self._start + len(self._kept):
            past = max(0, len(self._kept) - self._chunk)  # what the step at hand may still need
            self._start += past
            del self._kept[:past]
            self._read()
        return self._kept[index - self._start]

    def lines(self) -> list[str]:
        """What was read and what became of it, in words."""
        lost = [f"{n:,} dropped, {why}" for why, n in self.dropped.items()]
        lost += [f"{self.cut:,} cut at max_length"] if self.cut else []
        again = f", {self.passes} times to their end" if self.passes else ""
        return [
            f"stream: {', '.join([f'{self.rows:,} rows read{again}; {self.kept:,} kept', *lost])}"
        ]
