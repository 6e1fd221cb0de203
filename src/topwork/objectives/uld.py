"""Distillation across tokenizers (ULD, arXiv:2402.12030): where both split the same text alike, the
sorted probabilities of student and teacher are brought together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.groups import Group, collate_groups
from topwork.data.packing import Batch
from topwork.data.prepare import Prepared, Sample, opening, prepare
from topwork.data.rows import read_rows
from topwork.errors import ConfigError, DataError
from topwork.objectives.answers import means
from topwork.objectives.distill import UNREAD, head_of, seen_at
from topwork.objectives.familiar import settled
from topwork.objectives.reference import Reference
from topwork.objectives.routing import routed
from topwork.objectives.setup import (
    adapted,
    at_least,
    load_pair,
    load_teacher,
    named_sets,
    unread,
    where,
)
from topwork.objectives.sft import SFTConfig, marking_of, report
from topwork.objectives.vocabulary import added_ids
from topwork.peft import PeftConfig
from topwork.text import AutoTokenizer, Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings
from topwork.training.precision import cast

LEAST = 1e-8  # probability below which a token counts as this likely


@settings
class ULDConfig(SFTConfig):
    """A run of distillation from a teacher with another tokenizer, on the rows of fine-tuning."""

    learning_rate: float = 1e-6
    temperature: float = 1.0
    """Divides the student's logits."""
    teacher_temperature: float = 1.0
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """What `from_pretrained` is given beside the teacher's name."""
    sft_weight: float = 0.0
    """Weight of -log p of the rows' own tokens beside the distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("temperature", self.temperature, 0, above=True)
        at_least("teacher_temperature", self.teacher_temperature, 0, above=True)
        at_least("sft_weight", self.sft_weight, 0)
        if self.packing:
            raise ConfigError("packing: batches hold whole rows here, without padding anyway")
        unread(self, UNREAD, "distillation")


@dataclass(frozen=True)
class Twice(Sample):
    """A row in the student's tokens, the same one in the `teacher`'s, and the stretches [G] of
    trained tokens (each side's, counted among the trained ones) that say the same text."""

    teacher: Sample
    mine: tuple[range, ...]
    theirs: tuple[range, ...]


@dataclass(frozen=True)
class Stretches:
    """Which of N tokens belong to which of G stretches: the `last` of each [G], and the ones
    before it (`earlier` [M], of stretch `owner` [M])."""

    last: Tensor
    earlier: Tensor
    owner: Tensor

    @classmethod
    def of(cls, parts: Sequence[Sequence[range]], sizes: Sequence[int], device: Any) -> Stretches:
        """Of several rows with so many trained tokens, one after the other."""
        last, earlier, owner, at = [], [], [], 0
        for ranges, size in zip(parts, sizes):
            for one in ranges:
                earlier += [at + i for i in one[:-1]]
                owner += [len(last)] * (len(one) - 1)
                last.append(at + one[-1])
            at += size
        made = (torch.tensor(x, dtype=torch.long, device=device) for x in (last, earlier, owner))
        return cls(*made)

    def chances(self, logprobs: Tensor) -> Tensor:
        """Of each stretch, the probability of its tokens before the last one [G]."""
        floor = logprobs.clamp_min(float(np.log(LEAST)))
        sums = floor.new_zeros(len(self.last))
        return sums.index_add(0, self.owner, floor[self.earlier]).exp()


@dataclass
class Parallel:
    """A micro-batch in the student's tokens, in the teacher's, and where they go together."""

    batch: Batch
    teacher: Batch
    mine: Stretches
    theirs: Stretches


@dataclass(frozen=True)
class ULD:
    """Σ |p - q| over the sorted probabilities of student and teacher, for each stretch of text that
    ends in both; of a stretch of several tokens the last one's distribution counts, times the
    chance of the ones before. The units are stretches, and tokens of the rows' own likelihood."""

    teacher: Reference
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    sft_weight: float = 0.0
    router: float | None = None

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Twice]], world: World | None = None
    ) -> list[Parallel]:
        device = next(model.parameters()).device
        return [_parallel(group, device) for group in groups]

    def size(self, sample: Twice) -> int:
        return len(sample)

    def weight(self, batch: Parallel) -> tuple[float, float]:
        return float(len(batch.mine.last)), float(len(batch.batch.targets))

    def tokens(self, batch: Parallel) -> int:
        return batch.batch.tokens

    def rows(self, batch: Parallel) -> Sequence[int]:
        return batch.batch.rows

    def prompt(self, sample: Twice) -> Sample:
        return opening(sample)

    def loss(self, model: nn.Module, batch: Parallel) -> Loss:
        with routed(model, batch.batch, self.router) as routers:
            seen = seen_at(model, batch.batch)
        logprobs = _logprobs(model, seen, batch.batch.targets, self.temperature)
        with self.teacher.of(model) as teacher:
            other = seen_at(teacher, batch.teacher)
            said = _logprobs(teacher, other, batch.teacher.targets, self.teacher_temperature)
            head = head_of(teacher)
        found, told = self._distance((
            head_of(model), seen[batch.mine.last], batch.mine.chances(logprobs), self.temperature,
            head, other[batch.theirs.last], batch.theirs.chances(said), self.teacher_temperature,
        ))  # fmt: skip
        plain = _logprobs(model, seen, batch.batch.targets, 1.0) if self.sft_weight else logprobs
        total = torch.stack([found.sum(), -self.sft_weight * plain.sum()])
        if self.sft_weight:
            told["nll_loss"] = -plain
        return routers.beside(Loss(total, means(told)), self.weight(batch)[0])

    def _distance(self, sides: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of each stretch [G], and what is told of it. `sides`: of student and teacher the head,
        the hidden states, what they are scaled by, and the temperature."""
        found = ops.sorted_distance(*sides)
        return found, {"distance": found}


def _logprobs(model: Any, seen: Tensor, targets: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return model.token_logprobs(seen, targets)
    head = head_of(model)
    return ops.token_logprobs_of(lambda rows: head(rows).float() / temperature, seen, targets)


def _parallel(group: Sequence[Twice], device: torch.device) -> Parallel:
    own, theirs = list(group), [s.teacher for s in group]
    return Parallel(
        _in_order(own).to(device),
        _in_order(theirs).to(device),
        Stretches.of([s.mine for s in group], [s.supervised for s in own], device),
        Stretches.of([s.theirs for s in group], [s.supervised for s in theirs], device),
    )


def _in_order(samples: Sequence[Sample]) -> Batch:
    """The samples as they come, so that both sides have them alike."""
    none = np.zeros(0, np.int32)
    return collate_groups([Group(s.row, none, (s,)) for s in samples])


# -- alignment -----------------------------------------------------------------------------------


def stretches(
    mine: Sequence[float], theirs: Sequence[float]
) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """Tokens of both sides from one common end to the next; each token given by where it ends."""
    found: tuple[list[range], list[range]] = ([], [])
    starts, at = [0, 0], [0, 0]
    sides = (mine, theirs)
    while at[0] < len(mine) and at[1] < len(theirs):
        ends = mine[at[0]], theirs[at[1]]
        for side in (0, 1):
            if ends[side] <= ends[1 - side]:
                at[side] += 1
        if ends[0] == ends[1]:
            for side in (0, 1):
                found[side].append(range(starts[side], at[side]))
                starts[side] = at[side]
    assert all(a <= len(s) for a, s in zip(at, sides))
    return tuple(found[0]), tuple(found[1])


def token_ends(tokenizer: Tokenizer, ids: Sequence[int], inside: float) -> list[float]:
    """At which byte of the text each token ends; a token that ends within a character gets the
    last whole byte and `inside`, which no end of another side equals."""
    ends: list[float] = []
    whole = 0
    for k in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:k]), skip_special_tokens=True)
        if text.endswith("\ufffd"):
            ends.append(whole + inside)
        else:
            whole = len(text.encode())
            ends.append(whole)
    return ends


def pair_up(
    own: Prepared, other: Prepared, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
) -> tuple[list[Twice], list[str]]:
    """The rows that both sides kept and read as the same text, and lines about the others."""
    by_row = {s.row: s for s in other.samples}
    found: list[Twice] = []
    unlike = 0
    for sample in own.samples:
        twin = by_row.get(sample.row)
        if twin is None:
            continue
        pair = paired(sample, twin, tokenizer, teacher_tokenizer)
        unlike += pair is None
        if pair is not None and pair.mine:
            found.append(pair)
    if not found:
        raise DataError("no row says the same text to student and teacher")
    count = sum(len(s.mine) for s in found)
    lines = [f"teacher's tokens: {count:,} stretches of text end in both tokenizers"]
    if unlike:
        lines.append(f"{unlike} rows dropped, whose text differs between the two templates")
    lost = len(own.samples) - len(found) - unlike
    if lost:
        lines.append(f"{lost} rows dropped, of which the teacher keeps nothing")
    return found, lines


def paired(
    sample: Sample, twin: Sample, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
) -> Twice | None:
    """A row in the tokens of both sides; None if they do not say the same."""
    sides = ((sample, tokenizer, 0.25), (twin, teacher_tokenizer, 0.75))
    ids = [s.ids[1:][s.trained[1:]].tolist() for s, _, _ in sides]
    texts = [t.decode(i, skip_special_tokens=True) for i, (_, t, _) in zip(ids, sides)]
    if not _one_begins_the_other(*texts):
        return None
    ends = [token_ends(t, i, inside) for i, (_, t, inside) in zip(ids, sides)]
    return Twice(sample.row, sample.ids, sample.trained, twin, *stretches(*ends))


def _one_begins_the_other(one: str, other: str) -> bool:
    """Whether they say the same, as far as both go (either may be cut)."""
    shorter = min(len(one), len(other))
    return bool(shorter) and one[: shorter - 1] == other[: shorter - 1]


class ULDTrainer(Trainer):
    """The trainer with the ULD objective, from the rows of fine-tuning.

    `teacher_model`: a model or the name of one; `teacher_processing_class`: its tokenizer, if it is
    a model.
    """

    config_class: ClassVar[type[ULDConfig]] = ULDConfig

    def __init__(
        self,
        model: nn.Module | str | Path,
        teacher_model: nn.Module | str | Path | None = None,
        args: ULDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        teacher_processing_class: Tokenizer | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, self.config_class, optimizer, more)
        if teacher_model is None or train_dataset is None:
            raise ConfigError(f"{type(self).__name__} needs teacher_model and train_dataset")
        if teacher_processing_class is None:
            if isinstance(teacher_model, nn.Module):
                raise ConfigError("a loaded teacher needs teacher_processing_class, its tokenizer")
            teacher_processing_class = AutoTokenizer.from_pretrained(
                teacher_model, **where(args, "teacher_model_init_kwargs")
            )
        model, tokenizer = load_pair(model, processing_class, args)
        teacher = load_teacher(teacher_model, args)
        for name, one in (("model", model), ("teacher_model", teacher)):
            if not callable(getattr(one, "backbone", None)):
                raise ConfigError(f"{name}: load it with topwork.AutoModelForCausalLM")

        def read(rows: Any) -> tuple[Prepared, list[Twice], list[str]]:
            listed = read_rows(rows)
            own = prepare(listed, tokenizer, marking_of(args, tokenizer))
            other = teacher_processing_class
            theirs = prepare(listed, other, marking_of(replace(args, eos_token=None), other))
            return own, *pair_up(own, theirs, tokenizer, other)

        prepared, samples, lines = read(train_dataset)
        evals: dict[str, Sequence[Any]] = {
            name: read(rows)[1] for name, rows in named_sets(eval_dataset).items()
        }
        super().__init__(
            adapted(model, peft_config, added_ids(tokenizer, args)),
            args,
            self._objective(args, Reference(teacher), tokenizer, teacher_processing_class),
            samples,
            evals,
            tokenizer=tokenizer,
            callbacks=callbacks,
            optimizer=optimizer,
            data_fingerprint=prepared.fingerprint,
            notes=[*report(prepared, tokenizer), *lines],
        )
        if args.bf16 is not None:
            cast(teacher, args.bf16)
        teacher.to(self.device)

    def _objective(
        self, args: Any, teacher: Reference, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
    ) -> ULD:
        return ULD(
            teacher, args.temperature, args.teacher_temperature, args.sft_weight,
            args.router_aux_loss_coef,
        )  # fmt: skip


__all__ = ["ULD", "ULDConfig", "ULDTrainer"]
