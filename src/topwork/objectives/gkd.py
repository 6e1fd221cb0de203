"""On-policy distillation (GKD, arXiv:2306.13649): the student answers rows itself, and the teacher
says at every token what it would have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from topwork.data.packing import Batch
from topwork.data.prepare import Prepared, Sample
from topwork.errors import ConfigError, DataError
from topwork.objectives.distill import Distillation, DistillationConfig, DistillationTrainer
from topwork.objectives.familiar import WRITES, Familiar
from topwork.objectives.reference import Reference
from topwork.objectives.rollouts import EngineWriter, Prompt, SeeingWriter, roll_out
from topwork.objectives.setup import at_least
from topwork.text import Tokenizer
from topwork.training.distributed import World
from topwork.training.familiar import settings


@settings
class GKDConfig(DistillationConfig):
    """A run of on-policy distillation: rows of fine-tuning, their last answers written anew."""

    lmbda: float = 0.5
    """Share of the rows that the student answers itself."""
    seq_kd: bool = False
    """The teacher answers the others; else they are trained as they are."""
    beta: float = 0.5
    temperature: float = 0.9
    """Of the answers that are drawn, and of both models in the divergence."""
    top_p: float = 1.0
    """Answers are drawn from the likeliest tokens that make up so much of the chances."""
    top_k: int = 0
    """Answers are drawn from so many of the likeliest tokens; 0: from all."""
    max_new_tokens: int = 128

    familiar: ClassVar[dict[str, Familiar]] = WRITES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lmbda <= 1:
            raise ConfigError(f"lmbda={self.lmbda} must be in [0, 1]")
        at_least("max_new_tokens", self.max_new_tokens, 1)
        check_cuts(self)


def check_cuts(args: Any) -> None:
    """ConfigError for a cut of the chances that leaves nothing to draw from."""
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"top_p={args.top_p} must be above 0 and at most 1")
    at_least("top_k", args.top_k, 0)


@dataclass(frozen=True)
class GKD(Distillation):
    """The objective. `draws`: its batches are drawn, so a run stops between steps only."""

    lmbda: float = 0.5
    seq_kd: bool = False
    new: int = 128
    writer: EngineWriter | None = None
    draws: bool = True

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Sample]], world: World | None = None
    ) -> list[Batch]:
        """Who writes is tossed for each row; evaluation takes the rows as they are."""
        if world is not None:
            samples = [s for group in groups for s in group]
            own = (torch.rand(len(samples)) < self.lmbda).tolist()
            found = dict(enumerate(samples))
            found |= self._written(model, {i: s for i, s in enumerate(samples) if own[i]})
            if self.seq_kd:
                with self.teacher.of(model) as teacher:
                    rest = {i: s for i, s in enumerate(samples) if not own[i]}
                    found |= self._written(teacher, rest)
            written = iter(found[i] for i in range(len(samples)))
            groups = [[next(written) for _ in group] for group in groups]
        return super().assemble(model, groups, world)

    def sketch(self, model: nn.Module, sample: Sample) -> Batch:
        """A batch of the usual shape without drawing, to plan the memory."""
        (batch,) = super().assemble(model, [[sample]])
        return batch

    def _written(self, model: nn.Module, samples: dict[int, Sample]) -> dict[int, Sample]:
        """The samples with answers of `model` in place of their own."""
        if not samples:
            return {}
        assert self.writer is not None
        prompts = [asked(s) for s in samples.values()]
        writer = self.writer
        if self.placer is not None:
            writer = SeeingWriter(writer.options, self.placer)
        found = {}
        written = roll_out(writer, model, prompts, 1, self.new)
        for i, prompt, (answer,) in zip(samples, prompts, written):
            ids = np.concatenate([prompt.ids, np.asarray(answer.ids, np.int32)])
            trained = np.arange(len(ids)) >= len(prompt)
            found[i] = Sample(prompt.row, ids, trained, images=prompt.images)
        return found


def asked(sample: Sample) -> Prompt:
    """What is to be answered in `sample`, with its images."""
    ids = prompt_of(sample)
    images = tuple(image for image in sample.images if image.stop <= len(ids))
    return Prompt(sample.row, ids, None, {}, images=images)


def prompt_of(sample: Sample) -> np.ndarray:
    """The ids before the last stretch of trained ones."""
    last = int(np.flatnonzero(sample.trained)[-1])
    before = np.flatnonzero(~sample.trained[:last])
    return sample.ids[: int(before[-1]) + 1 if len(before) else 0]


class GKDTrainer(DistillationTrainer):
    """The trainer with the GKD objective; arguments as DistillationTrainer's."""

    config_class: ClassVar[type[DistillationConfig]] = GKDConfig

    def _objective(
        self, args: Any, teacher: Reference, tokenizer: Tokenizer, train: Prepared
    ) -> Distillation:
        bare = [s.row for s in train.samples if not len(prompt_of(s))]
        if bare and (args.lmbda or args.seq_kd):
            raise DataError(
                f"rows {bare[:5]} have no prompt before what is trained, so nobody can answer them"
            )
        writer = EngineWriter(
            {
                "do_sample": True,
                "temperature": args.temperature,
                "top_p": args.top_p,
                "top_k": args.top_k,
                "eos_token_id": tokenizer.eos_token_id,
            }
        )
        return GKD(
            teacher, args.beta, args.temperature, args.sft_weight, args.lmbda, args.seq_kd,
            args.max_new_tokens, writer,
        )  # fmt: skip


__all__ = ["GKD", "GKDConfig", "GKDTrainer"]
