"""What a tokenizer returns, and how a call's texts become its rows and columns."""

from __future__ import annotations

from typing import Any

from topwork.errors import ConfigError, nearest


class Encoding(dict[str, Any]):
    """The result of a call: `input_ids`, `attention_mask` and what else was asked for."""

    words: list[list[int | None]]

    def with_words(self, words: list[list[int | None]]) -> Encoding:
        """Itself, knowing for each row the word of each token."""
        self.words = words
        return self

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row, the number of the word that it comes from."""
        return self.words[batch_index]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the encoding has no {name!r}{nearest(name, self)}") from None

    def to(self, device: Any) -> Encoding:
        """A copy with its tensors on `device`."""
        return Encoding({k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()})


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
