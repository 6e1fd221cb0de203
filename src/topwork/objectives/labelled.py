"""The loss that a model gives itself for labelled rows: classes, tags, answers, other texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from topwork.data.collators import (
    LABELS,
    PLACES,
    PLAIN,
    Collator,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPacking,
    default_data_collator,
)
from topwork.errors import ConfigError, DataError
from topwork.models.base import CausalModel
from topwork.peft import PeftModel
from topwork.training import Loss
from topwork.training.distributed import World

# What a model's output holds beside its predictions.
NO_PREDICTIONS = ("loss", "past_key_values", "hidden_states", "attentions", "mems")


@dataclass(frozen=True)
class Numbered:
    """Rows with their numbers, read when they are asked for."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> tuple[int, Any]:
        return index, self.rows[index]


@dataclass(frozen=True)
class LabelledBatch:
    """`inputs`: what the model is called with; `rows`: the numbers of the rows in it; `units`:
    what the model's mean loss is a mean over."""

    inputs: dict[str, Any]
    rows: tuple[int, ...]
    units: float

    @property
    def labels(self) -> dict[str, Tensor]:
        """Those of the inputs that are to be predicted."""
        names = (n for n in self.inputs if "label" in n or n in PLACES)
        return {n: self.inputs[n] for n in names if self.inputs[n] is not None}


@dataclass(frozen=True)
class Labelled:
    """The model's mean loss over labelled rows, as a sum over its labels.

    `mean(model, inputs, return_outputs=…, num_items_in_batch=…)` gives the mean; `collate` turns
    rows into inputs. Columns that the model's `forward` does not take never reach it.
    """

    # Collators may draw (masks, augmentation), and batches are made before they are used.
    draws: ClassVar[bool] = True
    calls: ClassVar[bool] = True
    collate: Collator
    mean: Callable[..., Any]

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Any]], world: World | None = None
    ) -> list[LabelledBatch]:
        device = next(model.parameters()).device
        return [self._batch(model, group, device) for group in groups]

    def _batch(self, model: nn.Module, group: Sequence[Any], device: Any) -> LabelledBatch:
        numbers, rows = zip(*group)
        taken = accepted(model)
        given = list(rows[0]) if isinstance(rows[0], Mapping) else []
        if taken is not None and given and isinstance(self.collate, (*PLAIN, Usual)):
            wanted = taken | {*LABELS, "special_tokens_mask", "attention_mask"}
            rows = [{k: v for k, v in row.items() if k in wanted} for row in rows]
        made = self.collate(rows)
        if not isinstance(made, Mapping):
            raise DataError(f"the collator gave a {type(made).__name__}, not a mapping of tensors")
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in made.items()
            if taken is None or key in taken
        }
        if not inputs:
            raise DataError(
                f"{type(base(model)).__name__}.forward takes none of the columns {given}; it "
                f"takes {', '.join(sorted(taken or ()))}"
            )
        return LabelledBatch(inputs, tuple(numbers), units_of(model, inputs, len(rows)))

    def size(self, sample: tuple[int, Any]) -> int:
        row = sample[1]
        ids = row.get("input_ids") if isinstance(row, Mapping) else None
        if ids is None:
            return 1
        return ids.numel() if isinstance(ids, Tensor) else int(np.size(ids))

    def weight(self, batch: LabelledBatch) -> float:
        return batch.units

    def tokens(self, batch: LabelledBatch) -> int:
        inputs = batch.inputs
        if "lengths" in inputs:
            return sum(inputs["lengths"])
        if isinstance(inputs.get("attention_mask"), Tensor):
            return int(inputs["attention_mask"].sum())
        return inputs["input_ids"].numel() if "input_ids" in inputs else len(batch.rows)

    def rows(self, batch: LabelledBatch) -> Sequence[int]:
        return batch.rows

    def loss(self, model: nn.Module, batch: LabelledBatch) -> Loss:
        if not batch.units:  # the mean over nothing is no number, and teaches nothing
            return Loss(next(model.parameters()).sum() * 0)
        mean = self.mean(model, batch.inputs, num_items_in_batch=batch.units)
        return Loss(mean.float() * batch.units)

    def judged(self, model: nn.Module, batch: LabelledBatch) -> tuple[Loss | None, Any]:
        """The loss, where there are labels, and the model's outputs."""
        if not batch.labels:
            return None, model(**batch.inputs)
        mean, outputs = self.mean(
            model, batch.inputs, return_outputs=True, num_items_in_batch=batch.units
        )
        return Loss(mean.float() * batch.units if batch.units else mean.new_zeros(())), outputs


@dataclass(frozen=True)
class Usual:
    """The collator that fits the rows: packed if the model takes them so, padded, or stacked."""

    model: nn.Module
    processing_class: Any

    def __call__(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        ids = rows[0].get("input_ids") if isinstance(rows[0], Mapping) else None
        if ids is None or np.ndim(ids[0]) != 0:
            return default_data_collator(rows)
        taken = accepted(self.model) or ()
        if "lengths" in taken:
            return DataCollatorWithPacking()(rows)
        if not hasattr(self.processing_class, "pad"):
            return default_data_collator(rows)
        kinds = (DataCollatorForTokenClassification, DataCollatorForSeq2Seq)
        return kinds["decoder_input_ids" in taken](self.processing_class)(rows)


def base(model: Any) -> nn.Module:
    """The model below an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def accepted(model: nn.Module) -> frozenset[str] | None:
    """The names that the model's `forward` takes; None when it names none.

    A `forward(*args, **kwargs)` that passes everything on takes what the class above it takes.
    """
    for kind in type(base(model)).__mro__:
        if kind is not nn.Module and "forward" in vars(kind):
            known = list(inspect.signature(kind.forward).parameters.values())[1:]
            named = [p.name for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if named:
                return frozenset(named)
    return None


def units_of(model: nn.Module, inputs: Mapping[str, Any], rows: int) -> float:
    """What the model's mean loss is a mean over: whole-numbered labels that are not -100, or rows.

    A model that counts otherwise says so with a method `loss_units(inputs)`.
    """
    own = getattr(base(model), "loss_units", None)
    if own is not None:
        return float(own(inputs))
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return rows
    counts = labels != -100
    if isinstance(base(model), CausalModel):  # nothing stands before a text's first token
        counts = counts.clone()
        lengths = inputs.get("lengths") or (labels.shape[1],)
        counts[:, np.cumsum((0, *lengths[:-1]))] = False
    return int(counts.sum())


def loss_in(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The loss of a model's output: `.loss`, `["loss"]` or the first of several."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple):
        found = output[0]
    else:
        found = getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"the model's forward gave no loss for the columns {list(inputs)}; its labels are "
            "missing, or go under another name (`labels`; start_positions and end_positions)"
        )
    return found


def predictions_in(output: Any, model: nn.Module, ignore: Sequence[str] = ()) -> Any:
    """A model's predictions: one tensor, or a tuple of several.

    Question answering gives (start logits, end logits). Of outputs of other libraries: everything
    but the loss, caches and inner states.
    """
    if isinstance(output, Mapping):
        left = [v for k, v in output.items() if k not in (*NO_PREDICTIONS, *ignore)]
    elif isinstance(output, tuple):
        left = list(output[1:])
    elif getattr(base(model), "task", None) == "question-answering":
        left = list(output.logits.unbind(-1))
    elif hasattr(output, "logits"):
        left = [output.logits]
    else:
        named = {f.name: getattr(output, f.name) for f in fields(output)}
        left = [v for k, v in named.items() if k not in (*NO_PREDICTIONS, *ignore)]
    left = [v for v in left if v is not None]
    return left[0] if len(left) == 1 else tuple(left)


def by_row(values: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """What is one entry per token of packed texts [1, N, ...] as rows [B, T, ...], -100 beside."""
    packed = lengths is not None and values.dim() > 1 and values.shape[:2] == (1, sum(lengths))
    if not packed or lengths is None:
        return values
    pieces = list(values[0].split(list(lengths)))
    return nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=-100)


def on_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` on each array of a tuple, list or mapping of such."""
    if isinstance(tree, Mapping):
        return {k: on_leaves(function, v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(on_leaves(function, v) for v in tree)
    return function(tree)


def joined(trees: Sequence[Any], filler: float = -100) -> Any:
    """Batches one after the other: arrays [B, ...], filled up to the largest of each size."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {k: joined([t[k] for t in trees], filler) for k in first}
    if isinstance(first, tuple):
        return tuple(joined([t[i] for t in trees], filler) for i in range(len(first)))
    shape = np.max([t.shape[1:] for t in trees], axis=0, initial=0).astype(int)
    return np.concatenate([filled(t, tuple(shape), filler) for t in trees])


def filled(values: np.ndarray, shape: tuple[int, ...], filler: float) -> np.ndarray:
    """[B, ...] brought to [B, *shape]."""
    wide = [(0, 0), *((0, n - m) for n, m in zip(shape, values.shape[1:]))]
    return np.pad(values, wide, constant_values=filler)


def gathered(values: np.ndarray, count: int, world: World, filler: float = -100) -> np.ndarray:
    """The rows of all processes in the order of the data, of which process r has r, r + size …"""
    if world.size == 1:
        return values
    sizes = np.zeros((world.size, values.ndim - 1))
    sizes[world.rank] = values.shape[1:]
    shape = np.reshape(world.total(*sizes.flatten()), sizes.shape).max(0, initial=0).astype(int)
    whole, _ = world.gather(torch.from_numpy(filled(values, tuple(shape), filler)))
    order = np.concatenate([np.arange(r, count, world.size) for r in range(world.size)])
    return whole.numpy()[np.argsort(order)]
