"""Process rewards: whether each step of an answer is right, read at the step's end."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from topwork.data.formats import recognise
from topwork.data.preferences import STEPS, Stepwise
from topwork.data.prepare import describe_losses
from topwork.data.rows import read_rows
from topwork.errors import ConfigError, DataError
from topwork.models import AutoModelForTokenClassification
from topwork.objectives.answers import AnswersConfig, means
from topwork.objectives.familiar import settled
from topwork.objectives.reward import with_head
from topwork.objectives.setup import adapted, load_pair, named_sets, unread
from topwork.objectives.vocabulary import added_ids
from topwork.peft import PeftConfig, TaskType
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings


@settings
class PRMConfig(AnswersConfig):
    """A run of process reward modelling (arXiv:2211.14275)."""

    learning_rate: float = 1e-5
    step_separator: str = "\n"
    """Ends each step; its last token is where the step is judged."""
    train_on_last_step_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        unread(self, {"eos_token": (None,)}, "process rewards, whose steps end by step_separator")


@dataclass(frozen=True)
class Steps:
    """Row `row`'s tokens, where its steps end, and whether each is right."""

    row: int
    ids: np.ndarray
    ends: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass
class PreparedSteps:
    """The samples of a data set and what became of each row."""

    samples: list[Steps]
    rows: int
    cut: int
    dropped: Counter[str]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for s in self.samples:
            digest.update(s.ids.tobytes() + repr((s.ends, s.labels)).encode())
        return digest.hexdigest()


def prepare_steps(rows: Any, tokenizer: Tokenizer, args: PRMConfig) -> PreparedSteps:
    """Rows with prompt, completions and labels as tokens: each step and the separator behind it by
    themselves, so that a step ends where it ends when it is judged."""
    given = read_rows(rows)
    known = recognise(given, known=STEPS)
    between = tokenizer.encode(args.step_separator, add_special_tokens=False)
    if not between:
        raise ConfigError(f"step_separator={args.step_separator!r} gives no token")
    found = PreparedSteps([], len(given), 0, Counter())
    for number, row in enumerate(given):
        try:
            example: Stepwise = known.read(row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
        ids, ends = tokenizer.encode(example.prompt), []
        for step in example.steps:
            ids += tokenizer.encode(step, add_special_tokens=False) + between
            ends.append(len(ids) - 1)
        limit = args.max_length or len(ids)
        kept = [(e, int(label)) for e, label in zip(ends, example.labels) if e < limit]
        if len(kept) < len(ends) and not kept:
            found.dropped[f"whose first step ends beyond max_length={limit}"] += 1
            continue
        found.cut += len(kept) < len(ends)
        kept = kept[-1:] if args.train_on_last_step_only else kept
        places, labels = zip(*kept)
        found.samples.append(Steps(number, np.asarray(ids[: places[-1] + 1]), places, labels))
    if not found.samples:
        raise DataError(f"no row is left of {len(given)}: {dict(found.dropped)}")
    return found


@dataclass(frozen=True)
class StepsBatch:
    """Documents in one row [1, T]; steps end at `ends` [N] and are right or wrong, `labels` [N]."""

    input_ids: Tensor
    lengths: tuple[int, ...]
    ends: Tensor
    labels: Tensor
    rows: tuple[int, ...]


@dataclass(frozen=True)
class PRM:
    """Cross-entropy of right and wrong at each step's end; the units are steps."""

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Steps]], world: World | None = None
    ) -> list[StepsBatch]:
        device = next(model.parameters()).device
        batches = []
        for group in groups:
            lengths = tuple(len(s.ids) for s in group)
            starts = np.cumsum((0, *lengths[:-1]))
            ends = [start + end for start, s in zip(starts, group) for end in s.ends]
            ids = np.concatenate([s.ids for s in group]).astype(np.int64)
            labels = [label for s in group for label in s.labels]
            batches.append(
                StepsBatch(
                    torch.from_numpy(ids)[None].to(device),
                    lengths,
                    torch.tensor(np.asarray(ends), device=device),
                    torch.tensor(labels, device=device),
                    tuple(s.row for s in group),
                )
            )
        return batches

    def size(self, sample: Steps) -> int:
        return len(sample.ids)

    def weight(self, batch: StepsBatch) -> float:
        return len(batch.labels)

    def tokens(self, batch: StepsBatch) -> int:
        return batch.input_ids.shape[1]

    def rows(self, batch: StepsBatch) -> Sequence[int]:
        return batch.rows

    def loss(self, model: nn.Module, batch: StepsBatch) -> Loss:
        any_model: Any = model
        hidden = any_model.backbone(batch.input_ids, lengths=batch.lengths)
        logits = any_model.head(hidden[0, batch.ends]).float()
        right = (logits.argmax(1) == batch.labels).float()
        total = cross_entropy(logits, batch.labels, reduction="sum")
        return Loss(total, means({"accuracy": right}))


class PRMTrainer(Trainer):
    """The trainer of a process reward model, from rows with prompt, completions and labels.

    `model`: a token classifier with two labels, or the name of a model that becomes one.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: PRMConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, PRMConfig, optimizer, more)
        if train_dataset is None:
            raise ConfigError("PRMTrainer needs train_dataset")
        model, tokenizer = load_pair(
            model, processing_class, args, AutoModelForTokenClassification, num_labels=2
        )
        train = prepare_steps(train_dataset, tokenizer, args)
        evals = {
            name: prepare_steps(rows, tokenizer, args)
            for name, rows in named_sets(eval_dataset).items()
        }
        super().__init__(
            adapted(model, with_head(peft_config, TaskType.TOKEN_CLS), added_ids(tokenizer, args)),
            args,
            PRM(),
            train.samples,
            {name: p.samples for name, p in evals.items()},
            tokenizer=tokenizer,
            callbacks=callbacks,
            optimizer=optimizer,
            data_fingerprint=train.fingerprint,
            notes=report(train),
        )


def report(prepared: PreparedSteps) -> list[str]:
    """What the run trains on: counts of rows and steps, and what was lost."""
    steps = sum(len(s.labels) for s in prepared.samples)
    right = sum(sum(s.labels) for s in prepared.samples)
    return [
        f"data: stepwise format; {len(prepared.samples):,} of {prepared.rows:,} rows kept, "
        f"{steps:,} steps, {right:,} of them right",
        *describe_losses(prepared),
    ]


__all__ = ["PRM", "PRMConfig", "PRMTrainer"]
