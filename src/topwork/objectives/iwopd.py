"""Importance-weighted on-policy distillation (IW-OPD, arXiv:2606.22600): the student is drawn to
its teacher by the tokens that it wrote itself, and most by those before the two part ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from topwork.data.packing import Batch
from topwork.data.prepare import Prepared
from topwork.errors import ConfigError
from topwork.objectives.answers import means
from topwork.objectives.distill import Distillation, DistillationConfig
from topwork.objectives.familiar import Familiar, idle, refused
from topwork.objectives.gkd import GKD, GKDConfig, GKDTrainer
from topwork.objectives.logprobs import token_logprobs
from topwork.objectives.policy import Spread
from topwork.objectives.reference import Reference
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least
from topwork.text import Tokenizer
from topwork.training import Loss
from topwork.training.familiar import settings

LEAST = 1e-8  # an answer of which the two models think alike has no weight to share out


@settings
class IWOPDConfig(GKDConfig):
    """A run of importance-weighted on-policy distillation."""

    lmbda: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 512
    iw_opd_gamma: float = 0.5
    """How much more the first token of an answer counts than the last one."""

    familiar: ClassVar[dict[str, Familiar]] = {
        **idle("only the chance of the written token is compared", loss_top_k=1,
               loss_add_tail=True, reverse_kl_top_1_mode="sampled"),
        **idle("it is below what counts", iw_opd_epsilon=1e-8),
        **refused(
            distillation_objective=("iw_opd", "the divergence of all tokens is GKDTrainer's"),
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("iw_opd_gamma", self.iw_opd_gamma, 0)
        if self.beta != 1:
            raise ConfigError(
                f"beta={self.beta}: of the written token alone only KL(student ‖ teacher) is "
                "known; leave it at 1, or take GKDTrainer"
            )
        if self.sft_weight:
            raise ConfigError(
                f"sft_weight={self.sft_weight} would train the student on its own words; leave it 0"
            )


def early_weights(gains: Tensor, spread: Spread, gamma: float) -> Tensor:
    """1 + γ·(1 - S) [N]: S is the share of its answer's Σ |gain| that lies before the token, 0 at
    the first one. `gains` [N]: log q - log π of each token."""
    sizes = gains.abs()
    until = sizes.double().cumsum(0) - sizes
    first = until[(spread.counts().cumsum(0) - spread.counts()).long().clamp(max=len(gains) - 1)]
    before = (until - spread.over(first)).to(sizes.dtype)
    return 1 + gamma * (1 - before / spread.over(spread.sums(sizes).clamp_min(LEAST)))


@dataclass(frozen=True)
class IWOPD(GKD):
    """-log π of each written token, times how much likelier the teacher finds it, times its weight
    (`early_weights`), summed. The units are tokens."""

    gamma: float = 0.5

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        with routed(model, batch, self.router) as routers:
            logprobs = token_logprobs(model, batch, self.temperature)
        with self.teacher.of(model) as teacher:
            gains = token_logprobs(teacher, batch, self.temperature) - logprobs.detach()
        spread = Spread(batch.owners, len(batch.lengths))
        weights = early_weights(gains, spread, self.gamma)
        told = {"divergence": -gains, "iw_opd/mean_weight": weights,
                "iw_opd/mean_abs_advantage": gains.abs()}  # fmt: skip
        found = Loss(-(weights * gains * logprobs).sum(), means(told))
        return routers.beside(found, self.weight(batch))


class IWOPDTrainer(GKDTrainer):
    """The trainer with the IW-OPD objective; arguments as DistillationTrainer's."""

    config_class: ClassVar[type[DistillationConfig]] = IWOPDConfig

    def _objective(
        self, args: Any, teacher: Reference, tokenizer: Tokenizer, train: Prepared
    ) -> Distillation:
        plain = super()._objective(args, teacher, tokenizer, train)
        return IWOPD(**vars(plain), gamma=args.iw_opd_gamma)


__all__ = ["IWOPD", "IWOPDConfig", "IWOPDTrainer"]
