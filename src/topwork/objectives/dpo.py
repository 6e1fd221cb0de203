"""Direct preference optimisation, with every loss and divergence of its family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork.data.answers import Rated
from topwork.data.formats import Format
from topwork.data.preferences import PAIRS
from topwork.errors import ConfigError
from topwork.objectives import formulas
from topwork.objectives.answers import (
    AnswerBatch,
    Metrics,
    OverAnswers,
    halves,
    means,
    pair_metrics,
)
from topwork.objectives.logprobs import Scored, score, token_logprobs
from topwork.objectives.reference import Reference, ReferenceConfig, ReferenceTrainer
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least, one_of
from topwork.training import Loss
from topwork.training.distributed import World
from topwork.training.familiar import settings

LOSSES = (*formulas.PAIRWISE, *formulas.TOGETHER, "sft")


@settings
class DPOConfig(ReferenceConfig):
    """A run of direct preference optimisation."""

    loss_type: str | list[str] = "sigmoid"
    """One loss or several: sigmoid, hinge, ipo, sigmoid_norm, robust, exo_pair, nca_pair, bco_pair,
    sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft."""
    loss_weights: list[float] | None = None
    """Of the losses in `loss_type`; None: 1 each."""
    f_divergence_type: str = "reverse_kl"
    """reverse_kl, forward_kl, js_divergence or alpha_divergence."""
    f_alpha_divergence_coef: float = 0.5
    label_smoothing: float = 0.0
    """Share of labels taken as wrong; read by sigmoid, sigmoid_norm, robust, exo_pair, aot and
    aot_unpaired."""
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    """Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411)."""
    use_weighting: bool = False
    """Weight each pair by how likely the policy finds it (WPO, arXiv:2406.11827)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named = self.losses
        for name in named:
            one_of("loss_type", name, LOSSES)
        if not named or len(set(named)) < len(named):
            raise ConfigError(f"loss_type={self.loss_type!r} must name different losses")
        if self.loss_weights is not None and len(self.loss_weights) != len(named):
            raise ConfigError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(named)} losses"
            )
        one_of("f_divergence_type", self.f_divergence_type, formulas.DIVERGENCES)
        _check_combinations(self, set(named))
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"ld_alpha={self.ld_alpha} must be in [0, 1]")
        at_least("discopop_tau", self.discopop_tau, 0, above=True)

    @property
    def losses(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)


def _check_combinations(args: DPOConfig, named: set[str]) -> None:
    """ConfigError for settings that some of the losses cannot follow."""
    smoothing = args.label_smoothing
    unlinked = sorted(named - set(formulas.LINKED) - {"sft"})
    if args.f_divergence_type != "reverse_kl" and unlinked:
        raise ConfigError(
            f"f_divergence_type={args.f_divergence_type!r} has no meaning for {unlinked}; it goes "
            f"with {', '.join(formulas.LINKED)}"
        )
    if not 0 <= smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing={smoothing} must be in [0, 0.5): at a half the labels say nothing"
        )
    if smoothing and not named & set(formulas.SMOOTHED):
        raise ConfigError(
            f"label_smoothing is not read by {sorted(named)}, but by {', '.join(formulas.SMOOTHED)}"
        )
    if "exo_pair" in named and not smoothing:
        raise ConfigError("exo_pair needs label_smoothing above 0, such as 1e-3")
    together = sorted(named & set(formulas.TOGETHER))
    if together and args.use_weighting:
        raise ConfigError(f"use_weighting weighs pairs, but {together} tears them apart")
    if together and not args.disable_dropout:
        raise ConfigError(f"{together} sees a step twice, so it needs disable_dropout=True")


@dataclass
class StepBatch(AnswerBatch):
    """`ahead`, of losses over a whole step: the slope of each answer's log-probability [A] and the
    loss of each pair [P], from a first look at all micro-batches."""

    ahead: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class DPO(OverAnswers):
    """The objective. The units are pairs; of the term `sft` they are the chosen answers' tokens."""

    losses: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    dials: formulas.Dials = field(default_factory=formulas.Dials)
    link: Callable[[Tensor], Tensor] = formulas.reverse_kl
    reference: Reference = field(default_factory=Reference)
    ld_alpha: float | None = None
    use_weighting: bool = False
    policy: nn.Module | None = None

    @classmethod
    def of(cls, args: DPOConfig, reference: Reference, policy: nn.Module | None = None) -> DPO:
        return cls(
            args.losses,
            tuple(args.loss_weights or [1.0] * len(args.losses)),
            formulas.Dials(args.beta, args.label_smoothing, args.discopop_tau),
            formulas.link_of(args.f_divergence_type, args.f_alpha_divergence_coef),
            reference,
            args.ld_alpha,
            args.use_weighting,
            policy,
        )

    def state(self) -> dict[str, Tensor]:
        return {} if self.policy is None else self.reference.state(self.policy)

    # -- batches ---------------------------------------------------------------------------------

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Rated]], world: World | None = None
    ) -> list[StepBatch]:
        batches = [StepBatch(**vars(self.collect(model, group))) for group in groups]
        world = world or World()
        if self._compares_pairs and (len(batches) > 1 or world.size > 1):
            self._look_ahead(model, batches, world)
        return batches

    @property
    def _compares_pairs(self) -> bool:
        return any(name in formulas.TOGETHER for name in self.losses)

    def _look_ahead(self, model: nn.Module, batches: list[StepBatch], world: World) -> None:
        """Log-probabilities of the whole step without gradients, and from them what the losses
        that compare pairs say of each one (arXiv:2101.06983)."""
        with torch.no_grad():
            sums = [self._answers(token_logprobs(model, b.batch), b) for b in batches]
        references = [self._know_reference(model, b) for b in batches]
        counts = [b.answers // 2 for b in batches]
        own = [torch.stack((*halves(s), *halves(r))) for s, r in zip(sums, references)]
        step, mine = world.gather(torch.cat(own, 1).t().contiguous())
        with torch.enable_grad():
            chosen, rejected, ref_chosen, ref_rejected = (c.clone() for c in step.t())
            for leaf in (chosen, rejected):
                leaf.requires_grad_()
            blank = torch.ones_like(chosen)
            pairs = formulas.Pairs(chosen, rejected, ref_chosen, ref_rejected, blank, blank)
            losses = self._weighted(formulas.TOGETHER, pairs)
            slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
        per_pair = torch.stack(slopes, 1)[mine].split(counts)
        for batch, slope, height in zip(batches, per_pair, losses.detach()[mine].split(counts)):
            batch.ahead = slope.flatten(), height

    def _know_reference(self, model: nn.Module, batch: StepBatch) -> Tensor:
        """Log-probabilities of the answers under the reference [A], computed once."""
        if batch.reference is None:
            with self.reference.of(model) as reference:
                batch.reference = self._answers(token_logprobs(reference, batch.batch), batch)
        return batch.reference

    def reference_of(self, model: nn.Module, samples: Sequence[Rated]) -> Tensor:
        """What `precompute` keeps of these samples [A]."""
        return self._know_reference(model, StepBatch(**vars(self.collect(model, samples))))

    # -- the loss --------------------------------------------------------------------------------

    def weight(self, batch: StepBatch) -> tuple[float, ...]:
        pairs = float(batch.answers // 2)
        if "sft" not in self.losses:
            return (pairs,)
        return pairs, float(halves(batch.counts())[0].sum())

    def loss(self, model: nn.Module, batch: StepBatch) -> Loss:
        with routed(model, batch.batch, self.router) as routers:
            scored = score(model, batch.batch)
        sums = self._answers(scored.logprobs, batch)
        pairs = formulas.Pairs(
            *halves(sums),
            *halves(self._know_reference(model, batch)),
            *halves(batch.counts()),
            self.link,
        )
        weighing = self._pair_weights(scored, batch) if self.use_weighting else None
        losses = self._weighted(formulas.PAIRWISE, pairs)
        if batch.ahead is None:
            losses = losses + self._weighted(formulas.TOGETHER, pairs)
        else:
            slopes, heights = batch.ahead
            losses = losses + heights + (slopes * (sums - sums.detach())).view(-1, 2).sum(1)
        terms = [losses if weighing is None else losses * weighing]
        if "sft" in self.losses:
            plain = halves(batch.sums(scored.logprobs))[0]
            said = -self.weights[self.losses.index("sft")] * plain
            terms.append(said if weighing is None else said * weighing)
        found = Loss(torch.stack([t.sum() for t in terms]), self._metrics(pairs))
        return routers.beside(found, float(len(pairs.chosen)))

    def _weighted(self, table: dict[str, Callable[..., Tensor]], pairs: formulas.Pairs) -> Tensor:
        """The losses of `table` that are asked for, weighted and added: [P]."""
        parts = [
            weight * table[name](pairs, self.dials)
            for name, weight in zip(self.losses, self.weights)
            if name in table
        ]
        return sum(parts, torch.zeros_like(pairs.chosen))

    def _answers(self, logprobs: Tensor, batch: AnswerBatch) -> Tensor:
        """log π of each answer [A]; with `ld_alpha` its tokens beyond the shorter one's length
        count less."""
        if self.ld_alpha is None:
            return batch.sums(logprobs)
        counts = batch.counts()
        shorter = counts.view(-1, 2).amin(1).repeat_interleave(2)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(logprobs), device=logprobs.device) - starts[batch.owners]
        beyond = place >= shorter[batch.owners]
        return batch.sums(torch.where(beyond, self.ld_alpha * logprobs, logprobs))

    def _pair_weights(self, scored: Scored, batch: AnswerBatch) -> Tensor:
        """WPO's weight of each pair [P]."""
        surprise = scored.logprobs.detach() - scored.statistics().collision
        chosen, rejected = halves(formulas.weights(batch.sums(surprise), batch.counts()))
        return chosen * rejected

    def _metrics(self, p: formulas.Pairs) -> Metrics:
        beta = self.dials.beta
        logps = means({"logps/chosen": p.chosen, "logps/rejected": p.rejected})
        return {**pair_metrics(beta * p.c, beta * p.r), **logps}


class DPOTrainer(ReferenceTrainer):
    """The trainer with the DPO objective, from rows with (prompt,) chosen and rejected answers;
    `ref_model` as in `ReferenceTrainer`."""

    config_class: ClassVar[type[ReferenceConfig]] = DPOConfig
    formats: ClassVar[Sequence[Format]] = PAIRS

    def objective_of(self, args: Any, reference: Reference, policy: nn.Module) -> DPO:
        return DPO.of(args, reference, policy)

    def facts_of(self, args: Any) -> tuple[object, ...]:
        return (("ld", args.ld_alpha),)


__all__ = ["DPO", "DPOConfig", "DPOTrainer"]
