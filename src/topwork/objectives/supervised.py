"""`Trainer` as people know it: any model that gives itself a loss, with `compute_metrics`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from topwork import training
from topwork.data.collators import Collator
from topwork.errors import ConfigError
from topwork.objectives.labelled import (
    Labelled,
    LabelledBatch,
    Numbered,
    Usual,
    by_row,
    gathered,
    joined,
    loss_in,
    on_leaves,
    predictions_in,
)
from topwork.objectives.setup import named_sets
from topwork.training import TrainerCallback, TrainingArguments
from topwork.training.evaluation import Means
from topwork.training.results import speed, steps_of


class EvalPrediction(NamedTuple):
    """What `compute_metrics` gets, as arrays: predictions [rows, ...] and labels, -100 beside."""

    predictions: Any
    label_ids: Any


class PredictionOutput(NamedTuple):
    """What `predict` returns; `label_ids` is None where rows have no labels."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


class Trainer(training.Trainer):
    """Trains a model whose `forward` takes a batch and returns its mean loss over the labels.

    `model`: ours with any head, with or without adapter, or a torch module that returns `.loss`,
    {"loss": …} or (loss, …). Data: rows with numbers, in a list or whatever has a length.
    Without `data_collator` tokenized rows are packed, if the model takes them so, else padded by
    `processing_class`, and other rows stacked. The loss of a step is the mean over all its labels,
    however it is cut into micro-batches.
    """

    ignore_keys: Sequence[str] = ()
    """Of outputs of other libraries: what is no prediction."""

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LRScheduler | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if model is None and model_init is not None:
            model = model_init()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"Trainer needs a model, not a {type(model).__name__}; load it first")
        args = args or TrainingArguments()
        optimizer, scheduler = optimizers
        if scheduler is not None and optimizer is None:
            raise ConfigError("optimizers=(None, scheduler): a scheduler needs its optimizer")
        self.compute_metrics, self.compute_loss_func = compute_metrics, compute_loss_func
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        named = {name: numbered(rows, name) for name, rows in named_sets(eval_dataset).items()}
        data = () if train_dataset is None else numbered(train_dataset, "train_dataset")
        self.data_collator = data_collator or Usual(model, processing_class)
        super().__init__(
            model,
            args,
            self.labelled(args)(self.data_collator, self.compute_loss),
            data,
            named,
            tokenizer=processing_class,
            callbacks=callbacks or (),
            optimizer=optimizer,
            scheduler=scheduler,
            data_fingerprint=fingerprint(train_dataset),
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset

    def labelled(self, args: TrainingArguments) -> type[Labelled]:
        """The kind of objective of this run."""
        return Labelled

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        """The mean loss of a batch of `num_items_in_batch` labels; override it for your own."""
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            labels = inputs.get("labels")
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            loss = loss_in(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    # -- batches, to look at ---------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows of the training data as batches, in their order: for scripts to look at."""
        return self._loader(self.train_dataset, self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(chosen, self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        return self._loader(test_dataset, self.args.eval_batch_size)

    def _loader(self, rows: Any, size: int) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=size, collate_fn=self.data_collator)

    # -- evaluation ------------------------------------------------------------------------------

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] = (),
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The mean loss and what `compute_metrics` gives, logged under `eval_…`.

        `eval_dataset`: rows, several sets by name, or the name of one of the trainer's own.
        """
        self.ignore_keys = ignore_keys
        if isinstance(eval_dataset, str):
            if eval_dataset not in self.eval_data:
                raise ConfigError(f"there is no eval_dataset {eval_dataset!r}")
            chosen = {eval_dataset: self.eval_data[eval_dataset]}
        else:
            chosen = {n: numbered(rows, n) for n, rows in named_sets(eval_dataset).items()}
        return super().evaluate(chosen or None, metric_key_prefix)

    def measure(self, data: Sequence[Any]) -> dict[str, float]:
        if self.compute_metrics is None:
            return super().measure(data)
        return self._outcome(data).metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: Sequence[str] = (),
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Predictions for all rows in their order; loss and metrics where they have labels."""
        self.ignore_keys = ignore_keys
        started = time.perf_counter()
        with self.judging():
            found = self._outcome(numbered(test_dataset, "test_dataset"))
        count, size = len(test_dataset), self.args.eval_batch_size * self.world.size
        found.metrics.update(speed(time.perf_counter() - started, count, steps_of(count, size)))
        prefix = f"{metric_key_prefix}_"
        named = {prefix + k.removeprefix(prefix): v for k, v in found.metrics.items()}
        self._fire("on_predict", metrics=named)
        return found._replace(metrics=named)

    def judge(self, batch: LabelledBatch) -> tuple[training.Loss | None, Any]:
        """The loss of a batch (None without labels) and the model's predictions."""
        loss, outputs = self.objective.judged(self.model, batch)  # type: ignore[attr-defined]
        return loss, predictions_in(outputs, self.model, self.ignore_keys)

    @property
    def filler(self) -> float:
        """Stands beside predictions that are shorter than others."""
        return -100

    def _outcome(self, data: Sequence[Any]) -> PredictionOutput:
        if len(data) < self.world.size:
            raise ConfigError(f"{len(data)} rows are too few for {self.world.size} processes")
        means, predicted, wanted = Means(), [], []
        for batch in self.batches(data):
            loss, predictions = self.judge(batch)
            if loss is not None:
                means.add(loss, batch.units)
            lengths = batch.inputs.get("lengths")
            labels = tuple(by_row(v, lengths) for v in batch.labels.values())
            labels = labels[0] if len(labels) == 1 else labels
            predictions = on_leaves(partial(by_row, lengths=lengths), predictions)
            if self.preprocess_logits_for_metrics is not None:
                predictions = self.preprocess_logits_for_metrics(predictions, labels)
            predicted.append(on_leaves(as_array, predictions))
            wanted.append(on_leaves(as_array, labels))
        count, world = len(data), self.world
        predictions = on_leaves(
            lambda v: gathered(v, count, world, self.filler), joined(predicted, self.filler)
        )
        label_ids = None
        if not (isinstance(wanted[0], tuple) and not wanted[0]):
            label_ids = on_leaves(lambda v: gathered(v, count, world), joined(wanted))
        metrics = means.over(world)
        if label_ids is None:
            metrics = {}
        elif self.compute_metrics is not None:
            made = self.compute_metrics(EvalPrediction(predictions, label_ids))
            metrics |= {k: v.item() if hasattr(v, "item") else v for k, v in made.items()}
        return PredictionOutput(predictions, label_ids, metrics)


def as_array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def numbered(rows: Any, name: str) -> Any:
    """Rows as samples. ConfigError for what has no length, such as a stream."""
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ConfigError(
            f"{name or 'eval_dataset'} is a {type(rows).__name__}; it needs a length and rows by "
            "number: a list, a datasets.Dataset or a torch Dataset"
        )
    return Numbered(rows)


def fingerprint(rows: Any) -> str:
    """What tells training data apart: of a list some of its rows, else a name or the count."""
    named = getattr(rows, "_fingerprint", None)
    if named is not None:
        return str(named)
    digest = hashlib.sha256(str(len(rows) if rows is not None else 0).encode())
    if isinstance(rows, list):
        for row in rows[:: max(1, len(rows) // 256)]:
            digest.update(repr(row).encode())
    return digest.hexdigest()


__all__ = ["EvalPrediction", "PredictionOutput", "Trainer"]
