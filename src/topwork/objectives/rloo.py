"""RLOO: REINFORCE with the other answers of a group as baseline (arXiv:2402.14740).

The divergence from the start is part of the reward, and an answer counts as one action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.objectives import policy
from topwork.objectives.draws import Drawn, Rollout, sums_of
from topwork.objectives.grpo import GRPO, GRPOConfig, GRPOTrainer, corrected
from topwork.objectives.routing import routed
from topwork.objectives.setup import unread
from topwork.training.distributed import World
from topwork.training.familiar import settings
from topwork.training.objective import Loss


@settings
class RLOOConfig(GRPOConfig):
    """A run of RLOO. `beta` weighs the divergence that is taken off the reward."""

    num_generations: int = 2
    beta: float = 0.05
    advantage: str = "leave_one_out"
    normalize_advantages: bool = False
    """Bring the advantages of a step to mean 0 and deviation 1."""
    importance_correction: str = "sequence_truncate"

    def __post_init__(self) -> None:
        super().__post_init__()
        unread(self, UNREAD, "RLOO")
        if self.importance_correction.startswith("token"):
            raise ConfigError(
                f"importance_correction={self.importance_correction!r}: here an answer is one "
                "action; one of none, sequence_truncate, sequence_mask"
            )


# Of GRPO's settings, those that this loss does not read, with values that ask for nothing.
UNREAD = {
    "loss_type": ("dapo",), "delta": (None,), "importance_sampling_level": ("token",),
    "use_bias_correction_kl": (True,), "scale_rewards": ("group", "none"),
    "normalise_rewards_first": (False,), "advantage": ("leave_one_out",),
    "sapo_temperature_pos": (1.0,), "sapo_temperature_neg": (1.05,),
    "top_entropy_quantile": (1.0,), "entropy_coef": (0.0,), "off_policy_mask_threshold": (None,),
}  # fmt: skip


class RLOO(GRPO):
    """The objective."""

    def weight(self, batch: Rollout) -> float:
        return batch.answers

    def _advantages(
        self, model: nn.Module, drawn: list[Drawn], rewards: Tensor, world: World
    ) -> Tensor:
        args: Any = self.args
        summed = self.draw.jury.summed(rewards)
        if args.beta and self.reference is not None:
            summed = summed - args.beta * self._divergences(model, drawn).view(summed.shape)
        found = policy.leave_one_out(summed)
        if args.normalize_advantages:
            flat = found.reshape(1, -1)
            deviation = policy.nan_std(flat, 1) + 1e-4
            found = ((flat - policy.nan_mean(flat, 1)) / deviation).view(found.shape)
        return found

    @torch.no_grad()
    def _divergences(self, model: nn.Module, drawn: Sequence[Drawn]) -> Tensor:
        """log π - log π_ref summed over each answer [P · G]."""
        found = []
        for one in drawn:
            rollout = self._rollout(model, [one], torch.zeros(1, len(one.answers)))
            assert rollout.ref is not None
            gap = self._logprobs(model, rollout) - rollout.ref
            found.append(rollout.spread.sums(gap).cpu())
        return torch.cat(found)

    def loss(self, model: nn.Module, batch: Rollout) -> Loss:
        args, spread = self.args, batch.spread
        with routed(model, batch.batch, args.router_aux_loss_coef) as routers:
            new = self._logprobs(model, batch)
        old = new.detach() if batch.old is None else batch.old
        correction, told = corrected(args, batch, old)
        losses = policy.sequence_losses(
            new, old, batch.advantages, spread, args.epsilon, args.loss().high
        )
        if correction is not None:  # the same for all tokens of an answer
            losses = losses * spread.means(correction)
        found = Loss(losses.sum(), {**batch.metrics, **sums_of(told)})
        return routers.beside(found, self.weight(batch))


class RLOOTrainer(GRPOTrainer):
    """The trainer with the RLOO objective; arguments as GRPOTrainer's."""

    objective_class: ClassVar[type[GRPO]] = RLOO
    config_class: ClassVar[type[GRPOConfig]] = RLOOConfig
