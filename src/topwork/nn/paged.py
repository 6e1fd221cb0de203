"""A key/value cache in pages, for many texts of any length at once (arXiv:2309.06180).

A page holds `size` tokens of one text in every layer. Pages are counted, so texts that begin
alike share the pages of their beginning.

Letters: P pages, B rows, T new tokens, S tokens in sight, K key/value heads, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


class PagePool:
    """The pages of all layers, who uses them, and which full ones can be found by their text."""

    def __init__(self, layers: int, pages: int, size: int = 16) -> None:
        self.layers = layers
        self.pages = pages
        self.size = size
        self.keys: list[Tensor | None] = [
            None
        ] * layers  # [P, size, K, D] each, in memory head by head
        self.values: list[Tensor | None] = [None] * layers
        self._users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._page_of: OrderedDict[int, int] = OrderedDict()  # by name, oldest use first
        self._name_of: dict[int, int] = {}
        self._names: dict[tuple[Hashable, tuple[int, ...]], int] = {}
        self._next_name = 0

    def allocate(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's buffers, made when its first k, v [.., K, D] show what they are like."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys, values = (
                t.new_zeros(self.pages, t.shape[-2], self.size, t.shape[-1]).transpose(1, 2)
                for t in (k, v)
            )
            self.keys[layer], self.values[layer] = keys, values
        return keys, values

    @property
    def spare(self) -> int:
        """Pages that nobody uses (some still hold text that could be found again)."""
        return len(self._free) + sum(1 for p in self._page_of.values() if not self._users[p])

    def take(self, count: int) -> list[int]:
        """`count` pages for the caller alone; MemoryError when there are not so many."""
        if count > self.spare:
            raise MemoryError(f"{count} pages are wanted, {self.spare} are free")
        return [self._one() for _ in range(count)]

    def _one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:  # forget the text that was used longest ago
            name = next(n for n, p in self._page_of.items() if not self._users[p])
            page = self._page_of.pop(name)
            del self._name_of[page]
        self._users[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One user fewer for each; named pages stay findable until they are needed."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page] and page not in self._name_of:
                self._free.append(page)

    def name_for(self, before: Hashable, ids: tuple[int, ...]) -> int:
        """The name of a full page with `ids` behind what is called `before`."""
        key = (before, ids)
        if key not in self._names:
            if len(self._names) > 8 * self.pages:
                self.forget()
            self._names[key] = self._next_name
            self._next_name += 1
        return self._names[key]

    def find(self, name: int) -> int | None:
        """The page that holds the text called `name`, with one user more."""
        page = self._page_of.get(name)
        if page is not None:
            self._page_of.move_to_end(name)
            self._users[page] += 1
        return page

    def name(self, page: int, name: int) -> None:
        """Let others find a full page."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def forget(self) -> None:
        """Let no page be found any more (the weights have changed)."""
        for page in self._page_of.values():
            if not self._users[page]:
                self._free.append(page)
        self._page_of.clear()
        self._name_of.clear()
        self._names.clear()


class PagedRows:
    """Some texts of a pool as the cache of one pass: B rows with T new tokens each.

    `pages` holds each row's pages and `lengths` the tokens that each has already. Rows are
    aligned at their ends: `keep` [B, S] is False where a shorter row has nothing.
    """

    def __init__(
        self, pool: PagePool, pages: Sequence[Sequence[int]], lengths: Sequence[int], new: int
    ) -> None:
        self.pool = pool
        ends = [length + new for length in lengths]
        self.span = max(ends)
        place = torch.zeros(len(pages), self.span, dtype=torch.long)
        self.keep = torch.zeros(len(pages), self.span, dtype=torch.bool)
        offsets = torch.arange(pool.size)
        for row, (held, end) in enumerate(zip(pages, ends)):
            slots = (torch.tensor(held)[:, None] * pool.size + offsets).flatten()[:end]
            place[row] = slots[0]  # out of sight, and its own: another text's may be no numbers
            place[row, self.span - end :] = slots
            self.keep[row, self.span - end :] = True
        self._place = place // pool.size, place % pool.size
        self._new = tuple(t[:, self.span - new :] for t in self._place)
        self.length = self.span - new

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, T, K, D] to the rows' pages; returns what they may see, [B, S, K, D]."""
        found = []
        for buffer, new in zip(self.pool.allocate(k, v, layer), (k, v)):
            buffer[self._new] = new
            found.append(buffer[self._place])
        return found[0], found[1]

    def crop(self, length: int) -> None:
        raise ValueError("rows of a page pool are cropped by releasing their pages")

    def select(self, rows: Tensor) -> None:
        raise ValueError("rows of a page pool are not reordered")
