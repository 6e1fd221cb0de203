"""What a tokenizer returns, and how a call's texts become its rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from topwork.errors import ConfigError, nearest


class Span(NamedTuple):
    """From `start` up to `end`, which is not in it."""

    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """What a row comes from: the tokenizers library's encoding, and how much padding it got."""

    row: Any
    pads: int
    left: bool

    @classmethod
    def of(cls, rows: Sequence[Any], padded: Sequence[Sequence[int]], left: bool) -> list[Source]:
        """Those of encodings and the ids that became of them."""
        return [cls(row, len(ids) - len(row.ids), left) for row, ids in zip(rows, padded)]

    @property
    def before(self) -> int:
        return self.pads if self.left else 0

    def padded(self, values: Sequence[Any]) -> list[Any]:
        nothing = [None] * self.pads
        return [*nothing, *values] if self.left else [*values, *nothing]

    def shown(self, token: int | None) -> int | None:
        return None if token is None else token + self.before

    def inner(self, token: int) -> int:
        return token - self.before


class Encoding(dict[str, Any]):
    """The result of a call: `input_ids`, `attention_mask` and what else was asked for."""

    sources: Sequence[Source] = ()

    def of(self, sources: Sequence[Source]) -> Encoding:
        """Itself, knowing what each row comes from."""
        self.sources = sources
        return self

    @property
    def data(self) -> dict[str, Any]:
        return dict(self)

    @property
    def encodings(self) -> list[Any]:
        """Of the tokenizers library, one a row, without the padding."""
        return [source.row for source in self.sources]

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row, the number of the word that it comes from."""
        return self.sources[batch_index].padded(self.sources[batch_index].row.word_ids)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row, the part of the pair that it comes from."""
        return self.sources[batch_index].padded(self.sources[batch_index].row.sequence_ids)

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, its padding left out."""
        return list(self.sources[batch_index].row.tokens)

    # Where a thing of a row stands: (row, place), or the place alone in the first row.

    def char_to_token(self, row: int, char: int | None = None, sequence: int = 0) -> int | None:
        source, at = self._at(row, char)
        return source.shown(source.row.char_to_token(at, sequence))

    def token_to_chars(self, row: int, token: int | None = None) -> Span | None:
        source, at = self._at(row, token)
        found = source.row.token_to_chars(source.inner(at))
        return None if found is None else Span(*found)

    def token_to_word(self, row: int, token: int | None = None) -> int | None:
        source, at = self._at(row, token)
        return source.row.token_to_word(source.inner(at))

    def word_to_tokens(self, row: int, word: int | None = None, sequence: int = 0) -> Span | None:
        source, at = self._at(row, word)
        found = source.row.word_to_tokens(at, sequence)
        return None if found is None else Span(found[0] + source.before, found[1] + source.before)

    def _at(self, row: int, place: int | None) -> tuple[Source, int]:
        return (self.sources[0], row) if place is None else (self.sources[row], place)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the encoding has no {name!r}{nearest(name, self)}") from None

    def to(self, device: Any) -> Encoding:
        """A copy with its tensors on `device`."""
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()}
        return Encoding(moved).of(self.sources)


def plain(ids: Any) -> list[Any]:
    """Ids, or rows of them, from lists, arrays and tensors as lists of whole numbers."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, int):
        return [ids]
    return [i if isinstance(i, (int, list)) else i.tolist() if hasattr(i, "tolist") else list(i)
            for i in ids]  # fmt: skip


def inputs_of(text: Any, pair: Any, words: bool) -> tuple[bool, list[Any]]:
    """Whether `text` is a single one, and the rows to encode."""

    def alone(given: Any) -> bool:
        if words:
            return not given or isinstance(given[0], str)
        return isinstance(given, str)

    if text is None:
        raise ConfigError("neither text nor text_target is given")
    single = alone(text)
    firsts = [text] if single else list(text)
    if pair is None:
        return single, firsts
    if single is not alone(pair):
        raise ConfigError("text and text_pair must both be one text, or both a batch")
    seconds = [pair] if single else list(pair)
    if len(seconds) != len(firsts):
        raise ConfigError(f"{len(firsts)} texts, but {len(seconds)} text pairs")
    return single, list(zip(firsts, seconds))


def rows_of(encoded: list[Any], overflowing: bool) -> tuple[list[Any], list[int]]:
    """The encoded rows, with what was cut off if that is asked for, and whose each one is."""
    rows, owner = [], []
    for index, one in enumerate(encoded):
        pieces = [one, *one.overflowing] if overflowing else [one]
        rows += pieces
        owner += [index] * len(pieces)
    return rows, owner


def columns_of(rows: list[Any], types: bool, mask: bool, offsets: bool, special: bool) -> dict:
    """The entries of a result that are asked for, each a list of rows."""
    result = {"input_ids": [r.ids for r in rows]}
    for key, asked, field in (
        ("token_type_ids", types, "type_ids"),
        ("attention_mask", mask, "attention_mask"),
        ("offset_mapping", offsets, "offsets"),
        ("special_tokens_mask", special, "special_tokens_mask"),
    ):
        if asked:
            result[key] = [getattr(r, field) for r in rows]
    return result


def as_tensors(result: dict[str, Any], kind: str | None) -> Encoding:
    if kind is None:
        return Encoding(result)
    if kind not in ("pt", "np"):
        raise ConfigError(f"return_tensors={kind!r}; 'pt' or 'np'")
    if len({len(row) for row in result["input_ids"]}) > 1:
        raise ConfigError("rows of different lengths are no tensor; pass padding=True")
    if kind == "np":
        import numpy as np

        return Encoding({key: np.array(value) for key, value in result.items()})
    import torch

    return Encoding({key: torch.tensor(value) for key, value in result.items()})
