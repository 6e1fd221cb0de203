"""From rows that are tokenized to the tensors of a batch, under the names that people know.

A collator is a function of rows; these leave out columns that are no numbers. A column `label` or
`label_ids` comes as `labels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topwork.errors import ConfigError, DataError
from topwork.text import Tokenizer

Row = Mapping[str, Any]
Collator = Callable[[Sequence[Row]], Mapping[str, Any]]
NO_LABEL = -100
TOKENWISE = ("input_ids", "token_type_ids", "special_tokens_mask")
PLACES = ("start_positions", "end_positions")
LABELS = ("label", "label_ids", "labels")


def default_data_collator(features: Sequence[Row], return_tensors: str = "pt") -> dict[str, Any]:
    """Stack every column of numbers. DataError for one whose rows differ in shape."""
    _only_torch(return_tensors)
    return {
        "labels" if key in LABELS else key: _stacked(key, [row[key] for row in features])
        for key in _number_columns(features)
    }


@dataclass
class DataCollatorWithPadding:
    """Tokens to one length with the tokenizer's padding; the other columns stacked.

    `padding`: True or "longest", "max_length", False. Labels are not padded: for labels of tokens
    there is DataCollatorForTokenClassification.
    """

    tokenizer: Tokenizer
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _only_torch(self.return_tensors)

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        return default_data_collator(self.padded(features))

    def padded(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The rows with tokens of one length, columns that are no numbers left out."""
        keys = _number_columns(rows)
        whole = self.tokenizer.pad(
            [{key: row[key] for key in keys} for row in rows],
            self.padding,
            self.max_length,
            self.pad_to_multiple_of,
        )
        return [{key: whole[key][i] for key in whole} for i in range(len(rows))]


@dataclass
class DataCollatorForTokenClassification(DataCollatorWithPadding):
    """The same with a label for each token, padded with `label_pad_token_id`."""

    label_pad_token_id: int = NO_LABEL

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        name = _label_column(features)
        if name is None:
            return super().__call__(features)
        rest = [{k: v for k, v in row.items() if k != name} for row in features]
        batch = super().__call__(rest)
        width, left = batch["input_ids"].shape[1], self.tokenizer.padding_side == "left"
        batch["labels"] = _label_rows(features, name, width, self.label_pad_token_id, left)
        return batch


@dataclass
class DataCollatorForSeq2Seq:
    """Texts and their answers (`labels`), each padded to a length of its own.

    `model` may be given to add `decoder_input_ids`; our models make these of the labels themselves.
    """

    tokenizer: Tokenizer
    model: Any = None
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = NO_LABEL
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _only_torch(self.return_tensors)

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        name = _label_column(features)
        rest = [{k: v for k, v in row.items() if k != name} for row in features]
        inner = DataCollatorWithPadding(
            self.tokenizer, self.padding, self.max_length, self.pad_to_multiple_of
        )
        batch = inner(rest)
        if name is None:
            return batch
        width = max(len(row[name]) for row in features)
        if self.padding == "max_length" and self.max_length is not None:
            width = self.max_length
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        left = self.tokenizer.padding_side == "left"
        batch["labels"] = _label_rows(features, name, width, self.label_pad_token_id, left)
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            batch["decoder_input_ids"] = shift(labels=batch["labels"])
        return batch


@dataclass
class DataCollatorForMultipleChoice(DataCollatorWithPadding):
    """Rows of several choices, each column a list of one row a choice, to [B, choices, T]."""

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        name = _label_column(features)
        counts = {len(row["input_ids"]) for row in features}
        if len(counts) != 1:
            raise DataError(f"rows of {sorted(counts)} choices do not go into one batch")
        (count,) = counts
        rows = [{k: v for k, v in row.items() if k != name} for row in features]
        flat = [{k: v[i] for k, v in row.items()} for row in rows for i in range(count)]
        batch = {k: v.view(len(rows), count, -1) for k, v in super().__call__(flat).items()}
        if name is not None:
            batch["labels"] = torch.tensor([row[name] for row in features])
        return batch


@dataclass
class DataCollatorForLanguageModeling:
    """Texts as their own labels; with `mlm` some tokens are hidden, and only those are labels.

    Of the hidden tokens the share `mask_replace_prob` becomes the mask token and
    `random_replace_prob` any token; the rest stay as they are (arXiv:1810.04805). Drawn from
    torch's generator, or from one of `seed`.
    """

    tokenizer: Tokenizer
    mlm: bool = True
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    seed: int | None = None

    def __post_init__(self) -> None:
        _only_torch(self.return_tensors)
        shares = (self.mlm_probability, self.mask_replace_prob, self.random_replace_prob)
        if min(shares) < 0 or max(shares) > 1 or sum(shares[1:]) > 1:
            raise ConfigError(
                f"mlm_probability={shares[0]}, mask_replace_prob={shares[1]} and "
                f"random_replace_prob={shares[2]} must be shares, the last two of one whole"
            )
        if self.mlm and self.tokenizer.mask_token_id is None:
            raise ConfigError("mlm=True needs a tokenizer with a mask_token; or set mlm=False")
        self.generator = None
        if self.seed is not None:
            self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        rows = [row if isinstance(row, Mapping) else {"input_ids": row} for row in features]
        rows = [{k: v for k, v in row.items() if k not in LABELS} for row in rows]
        batch = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)(
            rows
        )
        special = batch.pop("special_tokens_mask", None)
        if self.mlm:
            batch["input_ids"], batch["labels"] = self.hidden(batch["input_ids"], special)
        else:
            real = batch["attention_mask"].bool()
            batch["labels"] = batch["input_ids"].masked_fill(~real, NO_LABEL)
        return batch

    def hidden(self, ids: Tensor, special: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids [B, T] with some of them hidden, and the labels [B, T]: what those were."""
        tokenizer = self.tokenizer
        if special is None:
            special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        chosen = self._drawn(ids, self.mlm_probability) & ~special.bool()
        labels = ids.masked_fill(~chosen, NO_LABEL)
        masked = self._drawn(ids, self.mask_replace_prob) & chosen
        ids = ids.masked_fill(masked, int(tokenizer.mask_token_id))
        if self.mask_replace_prob < 1 and self.random_replace_prob > 0:
            share = self.random_replace_prob / (1 - self.mask_replace_prob)
            other = self._drawn(ids, min(share, 1.0)) & chosen & ~masked
            words = torch.randint(len(tokenizer), ids.shape, generator=self.generator)
            ids = torch.where(other, words, ids)
        return ids, labels

    def _drawn(self, ids: Tensor, share: float) -> Tensor:
        return torch.bernoulli(torch.full(ids.shape, share), generator=self.generator).bool()


@dataclass(frozen=True)
class DataCollatorWithPacking:
    """Texts one after the other in a single row [1, N], with their `lengths`: no padding.

    For our models, whose `forward` takes `lengths`. Padding that rows come with (their
    `attention_mask` says so) is taken off.
    """

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        rows = [self.bare(row) for row in features]
        columns = _number_columns(rows)
        batch: dict[str, Any] = {"lengths": tuple(len(row["input_ids"]) for row in rows)}
        for key in columns:
            values = [np.asarray(row[key]) for row in rows]
            flat = key in TOKENWISE or (
                key in LABELS and all(v.shape == (n,) for v, n in zip(values, batch["lengths"]))
                and all(v.dtype.kind == "i" for v in values)
            )  # fmt: skip
            name = "labels" if key in LABELS else key
            if flat:
                batch[name] = torch.from_numpy(np.concatenate(values).astype(np.int64))[None]
            else:
                batch[name] = _stacked(key, [row[key] for row in rows])
        return batch

    @staticmethod
    def bare(row: Row) -> dict[str, Any]:
        """`row` without its mask and the padding that it marks."""
        mask = row.get("attention_mask")
        found = {k: v for k, v in row.items() if k != "attention_mask"}
        if mask is None or all(mask):
            return found
        keep = np.asarray(mask).astype(bool)
        for key, value in found.items():
            if key in PLACES:
                found[key] = int(value) - int(keep.argmax())
            elif key in TOKENWISE or (key in LABELS and np.shape(value) == keep.shape):
                found[key] = np.asarray(value)[keep]
        return found


# Collators that take nothing but what a model takes: other columns are not handed to them.
PLAIN = (DataCollatorWithPadding, DataCollatorForSeq2Seq, DataCollatorForLanguageModeling,
         DataCollatorWithPacking)  # fmt: skip


def _number_columns(rows: Sequence[Row]) -> list[str]:
    """The columns that all rows have as numbers. DataError when there is no row."""
    if not rows:
        raise DataError("there is no row to collate")
    return [key for key, value in rows[0].items() if _is_number(value)]


def _is_number(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (bool, int, float, np.ndarray, np.generic, Tensor, list, tuple))


def _stacked(key: str, values: Sequence[Any]) -> Tensor:
    """One tensor of a column's values, with the type that they have."""
    try:
        if isinstance(values[0], Tensor):
            return torch.stack(list(values))
        if isinstance(values[0], (np.ndarray, np.generic)):
            return torch.from_numpy(np.stack(values))
        return torch.tensor(values)
    except (ValueError, RuntimeError, TypeError) as error:
        raise DataError(
            f"column {key!r}: its rows are not of one shape ({error}); pad them with a collator "
            "such as DataCollatorWithPadding or DataCollatorForTokenClassification"
        ) from error


def _label_column(rows: Sequence[Row]) -> str | None:
    return next((name for name in LABELS if rows and name in rows[0]), None)


def _label_rows(rows: Sequence[Row], name: str, width: int, filler: int, left: bool) -> Tensor:
    """Labels of tokens [B, width]."""
    table = torch.full((len(rows), width), filler)
    for i, row in enumerate(rows):
        values = torch.as_tensor(row[name])
        if len(values) > width:
            raise DataError(f"row {i} of the batch has {len(values)} labels for {width} tokens")
        where = slice(width - len(values), None) if left else slice(0, len(values))
        table[i, where] = values
    return table


def _only_torch(kind: str) -> None:
    if kind != "pt":
        raise ConfigError(f"return_tensors={kind!r}: collators give torch tensors, 'pt'")
