"""Preferences from single answers that are good or bad (KTO, arXiv:2402.01306)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork.data.answers import PreparedAnswers, Rated
from topwork.data.formats import Format
from topwork.data.preferences import JUDGED
from topwork.data.prepare import Sample
from topwork.objectives import formulas
from topwork.objectives.answers import (
    AnswerBatch,
    OverAnswers,
    means,
)
from topwork.objectives.logprobs import token_logprobs
from topwork.objectives.reference import Reference, ReferenceConfig, ReferenceTrainer
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least, one_of
from topwork.training import Loss
from topwork.training.distributed import World
from topwork.training.familiar import settings

LOSSES = ("kto", "apo_zero_unpaired")


@settings
class KTOConfig(ReferenceConfig):
    """A run over single answers. Pairs are accepted too: each gives a good and a bad answer."""

    loss_type: str = "kto"
    """"kto", or "apo_zero_unpaired" (arXiv:2408.06266), which estimates no KL."""
    desirable_weight: float = 1.0
    """Weight of the good answers' losses."""
    undesirable_weight: float = 1.0
    """Weight of the bad answers' losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, LOSSES)
        at_least("desirable_weight", self.desirable_weight, 0)
        at_least("undesirable_weight", self.undesirable_weight, 0)


@dataclass
class JudgedBatch(AnswerBatch):
    """`kl`: how far the policy is from the reference, estimated over the whole step."""

    kl: float = 0.0


@dataclass(frozen=True)
class KTO(OverAnswers):
    """The objective; its units are answers.

    The KL is the mean log-ratio of answers to prompts that are not their own, at least 0. A sample
    brings such an answer along, that of the row before it, so that the estimate depends on neither
    micro-batches nor devices; it is taken over the whole step.
    """

    args: KTOConfig
    reference: Reference = field(default_factory=Reference)
    policy: nn.Module | None = None

    def state(self) -> dict[str, Tensor]:
        return {} if self.policy is None else self.reference.state(self.policy)

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Rated]], world: World | None = None
    ) -> list[JudgedBatch]:
        own = [[_only(s, 0) for s in group] for group in groups]
        batches = [JudgedBatch(**vars(self.collect(model, group))) for group in own]
        if self.args.loss_type == "kto":
            total, count = (world or World()).total(*self._mismatched(model, groups))
            for batch in batches:
                batch.kl = max(0.0, total / count)
        return batches

    def _mismatched(
        self, model: nn.Module, groups: Sequence[Sequence[Rated]]
    ) -> tuple[float, float]:
        """The log-ratios of this process's mismatched answers, summed, and their number."""
        total = 0.0
        for group in groups:
            batch = self.collect(model, [_only(s, 1) for s in group])
            with torch.no_grad():
                total += float(token_logprobs(model, batch.batch).sum())
            total -= float(self._know_reference(model, batch).sum())
        return total, float(sum(len(group) for group in groups))

    def reference_of(self, model: nn.Module, samples: Sequence[Rated]) -> Tensor:
        """What `precompute` keeps of these samples [A]."""
        return self._know_reference(model, self.collect(model, samples))

    def _know_reference(self, model: nn.Module, batch: AnswerBatch) -> Tensor:
        if batch.reference is None:
            with self.reference.of(model) as reference:
                batch.reference = batch.sums(token_logprobs(reference, batch.batch))
        return batch.reference

    def weight(self, batch: JudgedBatch) -> float:
        return float(batch.answers)

    def loss(self, model: nn.Module, batch: JudgedBatch) -> Loss:
        args, good = self.args, batch.values
        with routed(model, batch.batch, self.router) as routers:
            logps = batch.sums(token_logprobs(model, batch.batch))
        ratios = logps - self._know_reference(model, batch)
        losses = formulas.kto(ratios, good, batch.kl, args.beta)
        weights = good * args.desirable_weight + (1 - good) * args.undesirable_weight
        metrics = {"kl": (batch.kl * batch.answers, float(batch.answers))}
        for name, chosen in (("chosen", good.bool()), ("rejected", ~good.bool())):
            metrics |= means(
                {f"rewards/{name}": args.beta * ratios[chosen], f"logps/{name}": logps[chosen]}
            )
        return routers.beside(Loss((weights * losses).sum(), metrics), float(batch.answers))


def _only(sample: Rated, number: int) -> Rated:
    """`sample` with one of its answers: 0 its own, 1 that of another prompt."""
    known = sample.reference
    return replace(
        sample,
        answers=(sample.answers[number],),
        reference=None if known is None else (known[number],),
    )


def with_mismatched(samples: Sequence[Rated], limit: int | None) -> list[Rated]:
    """Each sample with the answer of the one before it as a second answer, cut at the limit."""
    mixed = []
    for own, other in zip(samples, (samples[-1], *samples)):
        room = None if limit is None else limit - len(own.prompt)
        (answer,) = other.answers
        beyond = [p.start for p in answer.images if room is not None and p.stop > room]
        stop = min([len(answer) if room is None else room, *beyond])
        images = tuple(p for p in answer.images if p.stop <= stop)
        cut = Sample(own.row, answer.ids[:stop], answer.trained[:stop], images=images)
        mixed.append(replace(own, answers=(*own.answers, cut)))
    return mixed


class KTOTrainer(ReferenceTrainer):
    """The trainer with the KTO objective, from rows with prompt, completion and label, or from
    pairs; `ref_model` as in `ReferenceTrainer`."""

    config_class: ClassVar[type[ReferenceConfig]] = KTOConfig
    formats: ClassVar[Sequence[Format]] = JUDGED
    single: ClassVar[bool] = True

    def objective_of(self, args: Any, reference: Reference, policy: nn.Module) -> KTO:
        return KTO(args, reference, policy)

    def samples_of(self, prepared: PreparedAnswers, args: Any) -> Sequence[Rated]:
        if args.loss_type != "kto":
            return prepared.samples
        return with_mismatched(prepared.samples, args.max_length)

    def notes_of(self, prepared: PreparedAnswers, args: Any) -> list[str]:
        return balance(prepared, args)

    def facts_of(self, args: Any) -> tuple[object, ...]:
        return args.loss_type, args.max_length


def balance(prepared: PreparedAnswers, args: KTOConfig) -> list[str]:
    """How many answers are good, and the weights that the paper advises for that (eq. 8)."""
    good = sum(1 for s in prepared.samples if s.value)
    bad = len(prepared) - good
    lines = [f"{good:,} good and {bad:,} bad answers"]
    if good and bad:
        ratio = (args.desirable_weight * good) / max(1e-12, args.undesirable_weight * bad)
        if not 0.99 < ratio < 4 / 3 + 0.01:
            low = args.undesirable_weight * bad / good
            lines.append(
                f"WARNING: weighted, they stand {ratio:.2f} to 1, advised is 1 to 1.33: "
                f"desirable_weight from {low:.2f} to {4 / 3 * low:.2f}"
            )
    return lines


__all__ = ["KTO", "KTOConfig", "KTOTrainer"]
