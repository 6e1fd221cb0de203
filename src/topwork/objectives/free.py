"""Preferences without a reference: ORPO, and CPO with SimPO and AlphaPO among its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from topwork.data.answers import PreparedAnswers, Rated
from topwork.data.formats import Format
from topwork.data.packing import Batch
from topwork.data.preferences import PAIRS
from topwork.errors import ConfigError
from topwork.media import ImageTextProcessor
from topwork.objectives import formulas
from topwork.objectives.answers import (
    AnswerBatch,
    AnswersConfig,
    OverAnswers,
    halves,
    means,
    pair_metrics,
    read_answers,
    report,
)
from topwork.objectives.familiar import settled
from topwork.objectives.logprobs import token_logprobs
from topwork.objectives.routing import routed
from topwork.objectives.setup import adapted, at_least, one_of
from topwork.objectives.sighted import described, load_reader
from topwork.objectives.vocabulary import added_ids
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings

CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")


@settings
class ORPOConfig(AnswersConfig):
    """A run of odds ratio preference optimisation (arXiv:2403.07691)."""

    beta: float = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen answers."""
    prompt_nll: bool = True
    """The likelihood is that of prompt and chosen answer, as in the authors' code; False: of the
    answer, as in their paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("beta", self.beta, 0, above=True)


@settings
class CPOConfig(AnswersConfig):
    """A run of contrastive preference optimisation (arXiv:2401.08417) or of SimPO."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    """Share of labels taken as wrong; read by sigmoid and simpo."""
    loss_type: str = "sigmoid"
    """sigmoid, hinge, ipo or simpo; the last two on log-probabilities per token."""
    cpo_alpha: float = 1.0
    """Weight of the chosen answers' likelihood; 0 with simpo gives SimPO itself."""
    simpo_gamma: float = 0.5
    """The margin that simpo asks for."""
    alpha: float = 0.0
    """Above 0: rewards (1 - p^-alpha) / alpha in place of log p (AlphaPO, arXiv:2501.03884)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, CPO_LOSSES)
        at_least("beta", self.beta, 0, above=True)
        at_least("cpo_alpha", self.cpo_alpha, 0)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ConfigError(f"label_smoothing is not read by {self.loss_type}")


@dataclass(frozen=True)
class ORPO(OverAnswers):
    """-mean log p of the chosen answers' tokens, and β times the odds ratio's loss of each pair."""

    beta: float = 0.1
    prompt_nll: bool = True

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Rated]], world: World | None = None
    ) -> list[AnswerBatch]:
        batches = [self.collect(model, group) for group in groups]
        if self.prompt_nll:
            for batch in batches:
                batch.batch = with_prompts(batch.batch)
        return batches

    def weight(self, batch: AnswerBatch) -> tuple[float, float]:
        chosen, _ = halves(batch.counts())
        beside = len(batch.batch.targets) - len(batch.owners)
        return float(chosen.sum()) + beside, float(len(chosen))

    def loss(self, model: nn.Module, batch: AnswerBatch) -> Loss:
        with routed(model, batch.batch, self.router) as routers:
            found = token_logprobs(model, batch.batch)
        beside = len(batch.batch.targets) - len(batch.owners)
        logprobs, prompts = found.split((len(batch.owners), beside))
        sums, counts = batch.sums(logprobs), batch.counts()
        chosen, rejected = halves(sums / counts)
        nll = -halves(sums)[0].sum() - prompts.sum()
        odds = formulas.orpo(chosen, rejected)
        apart = formulas.log_odds(chosen) - formulas.log_odds(rejected)
        units = self.weight(batch)[0]
        told = Loss(
            torch.stack((nll, self.beta * odds.sum())),
            {
                **pair_metrics(self.beta * chosen, self.beta * rejected),
                **means({"logps/chosen": chosen, "logps/rejected": rejected}),
                **means({"log_odds_ratio": -odds, "log_odds_chosen": apart}),
                "nll_loss": (float(nll.detach()), units),
            },
        )
        return routers.beside(told, units)


def with_prompts(batch: Batch) -> Batch:
    """`batch` with the prompts' tokens as further targets, behind the answers'."""
    places, at = [], 0
    for entry in batch.lengths:
        begin, *branches = entry if isinstance(entry, tuple) else (entry,)
        places.append(torch.arange(at + 1, at + begin))
        at += begin + sum(branches)
    wanted = torch.cat(places).to(batch.input_ids.device)
    return replace(
        batch,
        positions=torch.cat((batch.positions, wanted - 1)),
        targets=torch.cat((batch.targets, batch.input_ids[0, wanted])),
    )


@dataclass(frozen=True)
class CPO(OverAnswers):
    """The loss of each pair, and α times -mean log p of the chosen answers' tokens."""

    args: CPOConfig

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Rated]], world: World | None = None
    ) -> list[AnswerBatch]:
        return [self.collect(model, group) for group in groups]

    def weight(self, batch: AnswerBatch) -> tuple[float, float]:
        chosen, _ = halves(batch.counts())
        return float(len(chosen)), float(chosen.sum())

    def loss(self, model: nn.Module, batch: AnswerBatch) -> Loss:
        args = self.args
        with routed(model, batch.batch, self.router) as routers:
            sums = batch.sums(token_logprobs(model, batch.batch))
        said = sums / batch.counts() if args.loss_type in ("ipo", "simpo") else sums
        logps = halves(said)
        chosen, rejected = (formulas.alpha_reward(p, args.alpha) for p in logps)
        losses = formulas.cpo(
            chosen - rejected, args.loss_type, args.beta, args.label_smoothing, args.simpo_gamma
        )
        nll = -halves(sums)[0].sum()
        told = Loss(
            torch.stack((losses.sum(), args.cpo_alpha * nll)),
            {
                **pair_metrics(args.beta * chosen, args.beta * rejected),
                **means({"logps/chosen": logps[0], "logps/rejected": logps[1]}),
                "nll_loss": (float(nll.detach()), self.weight(batch)[1]),
            },
        )
        return routers.beside(told, float(len(losses)))


def check_prompts(args: Any, prepared: PreparedAnswers) -> None:
    """ConfigError where ORPO would train prompts that have images."""
    if getattr(args, "prompt_nll", False) and described(prepared.samples):
        raise ConfigError(
            "prompt_nll=True trains prompts, but images in them cannot be predicted: set it to "
            "False for rows with images"
        )


class WithoutReference(Trainer):
    """A trainer over given answers that needs no other policy."""

    CONFIG: Any
    formats: ClassVar[Sequence[Format]] = PAIRS
    objective_of: Any

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, self.CONFIG, optimizer, more)
        reader = load_reader(model, processing_class, args)
        data = read_answers(
            train_dataset, eval_dataset, reader.tokenizer, args, self.formats, placer=reader.placer
        )
        check_prompts(args, data.train)
        self.prepared, self.prepared_eval = data.train, data.evals
        super().__init__(
            adapted(reader.model, peft_config, added_ids(reader.tokenizer, args)),
            args,
            replace(
                self.objective_of(args), placer=reader.placer, router=args.router_aux_loss_coef
            ),
            data.train.samples,
            data.eval_samples,
            tokenizer=reader.processing,
            callbacks=callbacks,
            optimizer=optimizer,
            data_fingerprint=data.train.fingerprint,
            notes=report(data, reader.tokenizer),
        )


class ORPOTrainer(WithoutReference):
    """The trainer with the ORPO objective, from rows with (prompt,) chosen and rejected answers."""

    CONFIG = ORPOConfig

    @staticmethod
    def objective_of(args: ORPOConfig) -> ORPO:
        return ORPO(args.beta, args.prompt_nll)


class CPOTrainer(WithoutReference):
    """The trainer with CPO's losses, from rows with (prompt,) chosen and rejected answers."""

    CONFIG = CPOConfig
    objective_of = CPO


__all__ = ["CPO", "ORPO", "CPOConfig", "CPOTrainer", "ORPOConfig", "ORPOTrainer"]
