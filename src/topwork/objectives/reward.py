"""Reward models: one value for an answer (Bradley-Terry), or one for each step of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork.data.answers import Rated
from topwork.data.packing import Batch
from topwork.data.preferences import PAIRS
from topwork.errors import ConfigError
from topwork.models import AutoModelForSequenceClassification
from topwork.models.packing import document_ends
from topwork.objectives import formulas
from topwork.objectives.answers import (
    AnswerBatch,
    AnswersConfig,
    OverAnswers,
    halves,
    means,
    read_answers,
    report,
)
from topwork.objectives.familiar import settled
from topwork.objectives.logprobs import padded
from topwork.objectives.setup import adapted, load_pair
from topwork.objectives.vocabulary import added_ids
from topwork.peft import PeftConfig, TaskType
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings


@settings
class RewardConfig(AnswersConfig):
    """A run of reward modelling. Rows longer than `max_length` are dropped, not cut: the reward is
    read at an answer's end."""

    learning_rate: float = 1e-4
    center_rewards_coefficient: float | None = None
    """Weight of (sum of both rewards)², which keeps them about zero (arXiv:2312.09244)."""


@dataclass(frozen=True)
class Reward(OverAnswers):
    """-log σ(r(chosen) - r(rejected) - margin); the units are pairs."""

    centring: float | None = None

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Rated]], world: World | None = None
    ) -> list[AnswerBatch]:
        return [self.collect(model, group) for group in groups]

    def weight(self, batch: AnswerBatch) -> float:
        return batch.answers / 2

    def loss(self, model: nn.Module, batch: AnswerBatch) -> Loss:
        found = rewards(model, batch.batch)
        chosen, rejected = halves(found)
        losses = formulas.bradley_terry(chosen, rejected, batch.values)
        if self.centring is not None:
            losses = losses + self.centring * formulas.centring(chosen, rejected)
        said = found.detach()
        metrics = means(
            {
                "accuracy": (chosen > rejected).float(),
                "margin": chosen - rejected,
                "mean_reward": said,
            }
        )
        ends = {"min_reward": (float(said.min()), 1.0), "max_reward": (float(said.max()), 1.0)}
        return Loss(losses.sum(), {**metrics, **ends})


def rewards(model: nn.Module, batch: Batch) -> Tensor:
    """The reward [A] fp32 of each answer, read at its last token."""
    any_model: Any = model
    if callable(getattr(model, "backbone", None)):
        hidden = any_model.backbone(batch.input_ids, lengths=batch.lengths)
        ends = document_ends(batch.lengths, hidden.device)
        return any_model.head(hidden[0, ends])[:, 0].float()
    rows, keep, _ = padded(batch)
    return any_model(input_ids=rows, attention_mask=keep).logits[:, 0].float()


class RewardTrainer(Trainer):
    """The trainer of a reward model, from rows with (prompt,) chosen and rejected answers, and a
    margin where there is one.

    `model`: a sequence classifier with one label, or the name of a model that becomes one.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, RewardConfig, optimizer, more)
        model, tokenizer = load_pair(
            model, processing_class, args, AutoModelForSequenceClassification, num_labels=1
        )
        labels = getattr(model, "score", None)
        if labels is not None and getattr(labels, "out_features", 1) != 1:
            raise ConfigError(f"a reward model has one label, this one has {labels.out_features}")
        data = read_answers(train_dataset, eval_dataset, tokenizer, args, PAIRS, whole=True)
        self.prepared, self.prepared_eval = data.train, data.evals
        super().__init__(
            adapted(model, with_head(peft_config, TaskType.SEQ_CLS), added_ids(tokenizer, args)),
            args,
            Reward(args.center_rewards_coefficient),
            data.train.samples,
            data.eval_samples,
            tokenizer=tokenizer,
            callbacks=callbacks,
            optimizer=optimizer,
            data_fingerprint=data.train.fingerprint,
            notes=report(data, tokenizer, whole=True),
        )


def with_head(config: PeftConfig | None, task: TaskType) -> PeftConfig | None:
    """`config` so that the head, which starts untrained, is trained and saved with the adapter."""
    if config is None or config.task_type == task:
        return config
    if config.task_type is not None:
        raise ConfigError(
            f"task_type={str(config.task_type)!r} leaves the head untrained; it must be {task!s}"
        )
    return replace(config, task_type=task)


__all__ = ["Reward", "RewardConfig", "RewardTrainer"]
