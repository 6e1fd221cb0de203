"""How a model's tensors are named and laid out on disk: one invertible table for load and save.

A path pattern is a run of dot-separated parts, found anywhere in a name unless `^` or `$` anchors
it: `attn.*.c_fc` matches `h.0.attn.3.c_fc.weight`. `*` stands for one part and is kept; what stands
before and after the match is kept too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rename:
    """The path `disk` in the file is `memory` in the module."""

    disk: str
    memory: str


@dataclass(frozen=True)
class Convert:
    """What lies at `memory` is stored otherwise; `load` makes it of the file's, `save` back."""

    memory: str
    load: Callable[[Tensor], Tensor]
    save: Callable[[Tensor], Tensor]


def transposed(memory: str, first: int = 0, second: int = 1) -> Convert:
    """Tensors at `memory` are stored with two axes exchanged."""
    return Convert(
        memory, lambda t: t.transpose(first, second), lambda t: t.transpose(first, second)
    )


@dataclass(frozen=True)
class Pack:
    """Several tensors of the file are one in memory: `disk` lists its parts in order along `dim`.

    `sizes` None means equal parts. With `#` for one path part of `disk`, that number counts the
    first axis in memory: each entry is made of its own parts (experts), and `dim` counts within it.
    """

    disk: tuple[str, ...]
    memory: str
    dim: int = 0
    sizes: tuple[int, ...] | None = None

    @property
    def numbered(self) -> bool:
        return "#" in self.disk[0]


@dataclass(frozen=True)
class Unpack:
    """One tensor of the file is several in memory, cut along `dim`; `sizes` None: equally."""

    disk: str
    memory: tuple[str, ...]
    dim: int = 0
    sizes: tuple[int, ...] | None = None


Rule = Rename | Convert | Pack | Unpack


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file goes: to `name` whole, or to a part of it (`pack`), or, of the
    file's tensor, part `part` goes there (`unpack`)."""

    name: str
    pack: Pack | None = None
    unpack: Unpack | None = None
    part: int = 0
    index: int = 0


@dataclass(frozen=True)
class Stored:
    """A tensor as the file holds it; `make` forms it when its turn comes."""

    name: str
    nbytes: int
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Table:
    """Names on disk ↔ names in memory.

    `rules` work both ways: renames in the order given, then packing and converting by the renamed
    names. `old` holds further layouts that are read but never written. `drop`: regular expressions
    of file keys that may be left out when the module lacks them. `prefix`: a leading path that the
    file or the module may lack. `fresh`: regular expressions of tensors in memory that the file may
    lack (a new head).
    """

    rules: tuple[Rule, ...] = ()
    old: tuple[Rule, ...] = ()
    drop: tuple[str, ...] = ()
    prefix: str = ""
    fresh: tuple[str, ...] = ()

    # -- from the file ---------------------------------------------------------------------------

    def places(self, key: str, wanted: Mapping[str, object]) -> list[Place]:
        """Where the file's `key` goes among the `wanted` names; empty for nowhere."""
        # A file may also carry the names in memory (the layout that newer software saves).
        for found in (self._renamed_places(key), [Place(key)]):
            homes = [self._known(place.name, wanted) for place in found]
            if None not in homes:
                return [replace(place, name=home) for place, home in zip(found, homes)]
        return []

    def memory_name(self, key: str) -> str:
        """The file's `key` with all paths renamed."""
        for rule in (*self.old, *self.rules):
            if isinstance(rule, Rename):
                key = _swap(key, rule.disk, rule.memory) or key
        return key

    def _renamed_places(self, key: str) -> list[Place]:
        everything, name = (*self.old, *self.rules), self.memory_name(key)
        for rule in everything:
            if isinstance(rule, Unpack) and _match(rule.disk, name):
                homes = [_swap(name, rule.disk, memory) or name for memory in rule.memory]
                return [Place(home, unpack=rule, part=i) for i, home in enumerate(homes)]
            if isinstance(rule, Pack):
                for part, pattern in enumerate(rule.disk):
                    match = _match(pattern, name)
                    if match is not None:
                        home = _swap(name, pattern, rule.memory) or name
                        index = int(match["number"]) if rule.numbered else 0
                        return [Place(home, pack=rule, part=part, index=index)]
        return [Place(name)]

    def _known(self, name: str, wanted: Mapping[str, object]) -> str | None:
        tries = (name, self.prefix + name, name.removeprefix(self.prefix))
        return next((n for n in tries if n in wanted), None)

    def may_drop(self, key: str) -> bool:
        return any(re.search(pattern, key) for pattern in self.drop)

    def may_lack(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.fresh)

    def loaded(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of the file as `name` has it in memory."""
        for rule in (*self.old, *self.rules):
            if isinstance(rule, Convert) and _match(rule.memory, name):
                tensor = rule.load(tensor)
        return tensor

    # -- to the file -----------------------------------------------------------------------------

    def stored(self, state: Mapping[str, Tensor]) -> Iterator[Stored]:
        """The tensors of the file that say the same as `state`, in its order."""
        waiting = dict(state)
        for name in state:
            if name in waiting:
                yield from self._stored(name, waiting)

    def _stored(self, name: str, waiting: dict[str, Tensor]) -> Iterable[Stored]:
        for rule in self.rules:
            if isinstance(rule, Pack) and _match(rule.memory, name):
                tensor = self._saved(name, waiting.pop(name))
                pieces = pieces_of(tensor, rule)
                return [
                    _whole(self.disk_name(self._numbered(name, rule, part, index)), piece)
                    for index, part, piece in pieces
                ]
            if isinstance(rule, Unpack):
                pattern = next((p for p in rule.memory if _match(p, name)), None)
                if pattern is None:
                    continue
                names = [_swap(name, pattern, p) or name for p in rule.memory]
                if all(n in waiting for n in names):
                    parts = [self._saved(n, waiting.pop(n)) for n in names]
                    disk = self.disk_name(_swap(name, pattern, rule.disk) or name)
                    size = sum(p.numel() * p.element_size() for p in parts)
                    return [Stored(disk, size, partial(torch.cat, parts, rule.dim))]
        return [_whole(self.disk_name(name), self._saved(name, waiting.pop(name)))]

    def missing_keys(self, name: str, shape: torch.Size, filled: set[tuple[int, int]]) -> list[str]:
        """The file's keys that would make `name`, less the `filled` (index, part) of them."""
        for rule in self.rules:
            if isinstance(rule, Pack) and _match(rule.memory, name):
                count = shape[0] if rule.numbered else 1
                slots = [(i, p) for i in range(count) for p in range(len(rule.disk))]
                return [
                    self.disk_name(self._numbered(name, rule, part, index))
                    for index, part in slots
                    if (index, part) not in filled
                ]
        return [self.disk_name(name)]

    def _numbered(self, name: str, rule: Pack, part: int, index: int) -> str:
        return _swap(name, rule.memory, rule.disk[part].replace("#", str(index))) or name

    def _saved(self, name: str, tensor: Tensor) -> Tensor:
        for rule in self.rules:
            if isinstance(rule, Convert) and _match(rule.memory, name):
                tensor = rule.save(tensor)
        return tensor

    def disk_name(self, name: str) -> str:
        """`name` in memory with all paths as the file has them."""
        for rule in reversed(self.rules):
            if isinstance(rule, Rename):
                name = _swap(name, rule.memory, rule.disk) or name
        return name


PLAIN = Table()  # names in the file are the module's


def pieces_of(tensor: Tensor, rule: Pack) -> Iterator[tuple[int, int, Tensor]]:
    """Each part of a packed tensor as a view: (index, part, view)."""
    for index, entry in enumerate(tensor if rule.numbered else [tensor]):
        for part, piece in enumerate(cut(entry, rule)):
            yield index, part, piece


def cut(tensor: Tensor, rule: Pack | Unpack) -> tuple[Tensor, ...]:
    """`tensor` along the rule's `dim` in its parts, as views."""
    if rule.sizes is not None:
        return tensor.split(list(rule.sizes), rule.dim)
    count = len(rule.disk if isinstance(rule, Pack) else rule.memory)
    return tensor.chunk(count, rule.dim)


def _whole(name: str, tensor: Tensor) -> Stored:
    return Stored(name, tensor.numel() * tensor.element_size(), tensor.contiguous)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    start, stop = pattern.startswith("^"), pattern.endswith("$")
    parts = pattern.removeprefix("^").removesuffix("$").split(".")
    inner = r"\.".join(
        {"*": r"([^.]+)", "#": r"(?P<number>\d+)"}.get(part, re.escape(part)) for part in parts
    )
    return re.compile(("^" if start else r"(?:^|(?<=\.))") + inner + ("$" if stop else r"(?=\.|$)"))


def _match(pattern: str, name: str) -> re.Match[str] | None:
    return _compiled(pattern).search(name)


def _swap(name: str, old: str, new: str) -> str | None:
    """`name` with the path `old` replaced by `new`, stars kept; None where `old` is not in it."""
    match = _match(old, name)
    if match is None:
        return None
    number = match.re.groupindex.get("number")
    stars = iter([text for i, text in enumerate(match.groups(), 1) if i != number])
    parts = new.removeprefix("^").removesuffix("$").split(".")
    middle = ".".join(next(stars) if part == "*" else part for part in parts if part)
    before, after = name[: match.start()], name[match.end() :]
    return before + middle + after if middle else before + after.removeprefix(".")
