"""The pages of one text: taken, found again, and named for others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from topwork.nn.paged import PagePool


class Chain:
    """Pages in a text's order. From the page with the token `start` on they are named after `of`
    too: before it stands what every text with the same tokens has.
    """

    def __init__(self, start: int = 0, of: Hashable = None) -> None:
        self.pages: list[int] = []
        self._start = start
        self._of = of
        self._names: list[int] = []  # of the full pages
        self._named = 0

    def names(self, text: Sequence[int], pool: PagePool) -> list[int]:
        """A name for each full page of `text`."""
        size = pool.size
        while (len(self._names) + 1) * size <= len(text):
            end = (len(self._names) + 1) * size
            before: Hashable = self._names[-1] if self._names else None
            if self._of is not None and end - size <= self._start < end:
                before = before, self._of
            self._names.append(pool.name_for(before, tuple(text[end - size : end])))
        return self._names

    def promised(self, count: int) -> list[int]:
        """Names of the first `count` pages that are still to be written."""
        return self._names[self._named : count]

    def find(self, text: Sequence[int], pool: PagePool) -> None:
        """Take over pages that hold the beginning already, but for the last token."""
        for name in self.names(text, pool)[: (len(text) - 1) // pool.size]:
            page = pool.find(name)
            if page is None:
                break
            self.pages.append(page)
        self._named = len(self.pages)

    def keep(self, count: int, pool: PagePool) -> None:
        """Give the pages after the first `count` back."""
        pool.release(self.pages[count:])
        self.pages = self.pages[:count]
        self._named = min(self._named, count)

    def name(self, held: int, text: Sequence[int], pool: PagePool) -> None:
        """Let others find the pages that `held` tokens fill."""
        full = min(held // pool.size, len(self.names(text, pool)))
        for i in range(self._named, full):
            pool.name(self.pages[i], self._names[i])
        self._named = max(self._named, full)
