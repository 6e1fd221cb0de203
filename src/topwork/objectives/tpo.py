"""Triple preference optimisation (TPO, arXiv:2405.16681): beside two of the model's answers to a
prompt, chosen and rejected, a reference answer that it learns as in fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from topwork.data.answers import Rated
from topwork.data.formats import Format
from topwork.data.preferences import TRIPLES
from topwork.errors import ConfigError
from topwork.objectives import formulas
from topwork.objectives.answers import (
    AnswerBatch,
    AnswersConfig,
    OverAnswers,
    means,
    pair_metrics,
)
from topwork.objectives.free import WithoutReference
from topwork.objectives.logprobs import token_logprobs
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least, one_of
from topwork.training import Loss
from topwork.training.distributed import World
from topwork.training.familiar import settings

LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "tpo-l": "simpo"}
"""TPO's name of a loss → the one in `formulas.cpo`."""


@settings
class TPOConfig(AnswersConfig):
    """A run of triple preference optimisation."""

    learning_rate: float = 5e-7
    beta: float = 0.01
    label_smoothing: float = 0.0
    """Share of labels taken as wrong; read by sigmoid and tpo-l."""
    loss_type: str = "sigmoid"
    """sigmoid, hinge, ipo or tpo-l; the last two on log-probabilities per token."""
    tpo_alpha: float = 1.0
    """Weight of the reference answers' likelihood."""
    tpo_l_gamma: float = 0.5
    """The margin that tpo-l asks for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, LOSSES)
        at_least("beta", self.beta, 0, above=True)
        if not self.tpo_alpha > 0:
            raise ConfigError(
                f"tpo_alpha={self.tpo_alpha} must be above 0: without its reference answers TPO is "
                "CPO with cpo_alpha=0"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ConfigError(f"label_smoothing is not read by {self.loss_type}")


def thirds(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[A] of answers, chosen, rejected and reference in turn, as three [P]."""
    chosen, rejected, reference = values.view(-1, 3).unbind(1)
    return chosen, rejected, reference


@dataclass(frozen=True)
class TPO(OverAnswers):
    """The loss of each pair, and α times -mean log p of the reference answers' tokens."""

    args: TPOConfig

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Rated]], world: World | None = None
    ) -> list[AnswerBatch]:
        return [self.collect(model, group) for group in groups]

    def weight(self, batch: AnswerBatch) -> tuple[float, float]:
        return batch.answers / 3, float(thirds(batch.counts())[2].sum())

    def loss(self, model: nn.Module, batch: AnswerBatch) -> Loss:
        args = self.args
        with routed(model, batch.batch, self.router) as routers:
            sums = batch.sums(token_logprobs(model, batch.batch))
        by_token = args.loss_type in ("ipo", "tpo-l")
        chosen, rejected, _ = thirds(sums / batch.counts() if by_token else sums)
        kind = LOSSES[args.loss_type]
        losses = formulas.cpo(
            chosen - rejected, kind, args.beta, args.label_smoothing, args.tpo_l_gamma
        )
        nll = -thirds(sums)[2].sum()
        told = Loss(
            torch.stack((losses.sum(), args.tpo_alpha * nll)),
            {
                **pair_metrics(args.beta * chosen, args.beta * rejected),
                **means({"logps/chosen": chosen, "logps/rejected": rejected}),
                "nll_loss": (float(nll.detach()), self.weight(batch)[1]),
            },
        )
        return routers.beside(told, float(len(losses)))


class TPOTrainer(WithoutReference):
    """The trainer with the TPO objective, from rows with (prompt,) chosen, rejected and reference
    answers."""

    CONFIG = TPOConfig
    formats: ClassVar[Sequence[Format]] = TRIPLES
    objective_of = TPO


__all__ = ["TPO", "TPOConfig", "TPOTrainer"]
