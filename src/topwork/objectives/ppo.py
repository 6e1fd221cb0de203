"""Proximal policy optimisation with a critic (arXiv:1707.06347), its rewards and divergence token
by token (arXiv:1909.08593)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.media import ImageTextProcessor
from topwork.objectives import critic, policy
from topwork.objectives.begin import set_up
from topwork.objectives.critic import ActorCritic, with_critic
from topwork.objectives.draws import (
    Drawn,
    DrawsConfig,
    OverDraws,
    Rollout,
    collate_answers,
    split,
    sums_of,
)
from topwork.objectives.familiar import settled
from topwork.objectives.grpo import corrected
from topwork.objectives.logprobs import score, token_logprobs
from topwork.objectives.policy import PolicyLoss
from topwork.objectives.reference import Reference
from topwork.objectives.rewards import RewardFunc
from topwork.objectives.rollouts import Answer, Prompt
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least, one_of
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings

ESTIMATES = ("k1", "k3")


@settings
class PPOConfig(DrawsConfig):
    """A run of PPO."""

    num_ppo_epochs: int = 4
    """Passes over the same answers."""
    gamma: float = 1.0
    """What a reward loses for each token that it lies ahead."""
    lam: float = 0.95
    """λ of the advantage estimates: 0 trusts the critic, 1 the rewards."""
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    """Weight of the critic's loss."""
    kl_coef: float = 0.05
    """Weight of the divergence from the start of the run that is taken off each token's reward; 0
    needs no reference."""
    kl_estimator: str = "k1"
    """"k1": log π - log π_ref; "k3": the estimate that is never negative."""
    whiten_rewards: bool = False
    """Bring the rewards of the tokens of a draw to deviation 1."""
    whiten_advantages: bool = True
    """Bring the advantages of the tokens of a draw to mean 0 and deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_ppo_epochs", self.num_ppo_epochs, 1)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("cliprange", "cliprange_value"):
            at_least(name, getattr(self, name), 0, above=True)
        at_least("vf_coef", self.vf_coef, 0)
        at_least("kl_coef", self.kl_coef, 0)
        one_of("kl_estimator", self.kl_estimator, ESTIMATES)


@dataclass
class Estimated(Rollout):
    """`advantages`, the critic's `values` at the draw and the `returns` that it learns, all [N]."""

    values: Tensor | None = None
    returns: Tensor | None = None


@dataclass
class PPO(OverDraws):
    """The objective. The units of both terms, policy and critic, are tokens."""

    kind: type[Any] = Estimated
    reference: Reference | None = None

    @property
    def passes(self) -> int:
        return self.args.num_ppo_epochs

    def weight(self, batch: Estimated) -> tuple[float, float]:
        tokens = float(len(batch.batch.targets))
        return tokens, tokens

    # -- from prompts to micro-batches -----------------------------------------------------------

    @torch.no_grad()
    def collected(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None
    ) -> list[Estimated]:
        """Draw and judge the answers, and estimate what each token was worth."""
        actor: Any = model
        number = None if world is None else self.number
        drawn = self.draw(actor.policy, [p for group in groups for p in group], number)
        found = [self._rollout(actor, part) for part in split(groups, drawn)]
        rewards, kls = [], []
        for one, part in zip(found, split(groups, drawn)):
            per_token, kl = self._rewards(one, part)
            rewards.append(per_token)
            kls.append(kl)
        self._estimate(found, rewards, world or World())
        for one, part, kl in zip(found, split(groups, drawn), kls):
            assert one.values is not None
            assert one.returns is not None
            told = {"kl": kl, "values/mean": one.values, "returns/mean": one.returns}
            one.metrics = {**self.draw.metrics(part), **sums_of(told)}
        self.draw.keep(drawn[0], found[0].spread.means(found[0].advantages)[: self.answers])
        return found

    def _rollout(self, model: ActorCritic, drawn: Sequence[Drawn]) -> Estimated:
        """What policy, critic and reference say of these answers, without advantages yet."""
        batch, sampled = collate_answers(
            drawn, next(model.parameters()).device, placer=self.draw.placer
        )
        scored = score(model.policy, batch, temperature=self.args.temperature)
        one = Estimated(batch, torch.zeros_like(scored.logprobs), scored.logprobs, sampled=sampled)
        one.values = model.values(batch, scored.seen)
        if self.reference is not None:
            with self.reference.of(model.policy) as reference:
                one.ref = token_logprobs(reference, batch, self.args.temperature)
        return one

    def _rewards(self, one: Estimated, drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        """Each token's reward [N], the answer's own at its end, and its divergence [N]."""
        old = one.old
        assert old is not None
        kl = torch.zeros_like(old)
        if one.ref is not None:
            kl = old - one.ref if self.args.kl_estimator == "k1" else policy.kl_k3(old, one.ref)
        scores = self.draw.jury.summed(torch.cat([d.rewards for d in drawn])).to(old.device)
        return critic.with_score(-self.args.kl_coef * kl, scores, one.spread), kl

    def _estimate(self, found: list[Estimated], rewards: list[Tensor], world: World) -> None:
        """Advantages and returns of a whole draw, whitened over all of it."""
        args = self.args
        if args.whiten_rewards:
            rewards = policy.whitened(rewards, world, centre=False)
        for one, own in zip(found, rewards):
            assert one.values is not None
            one.advantages = critic.advantages(own, one.values, one.spread, args.gamma, args.lam)
            one.returns = one.advantages + one.values
        if args.whiten_advantages:
            for one, own in zip(found, policy.whitened([o.advantages for o in found], world)):
                one.advantages = own

    def remember(self, model: nn.Module, batch: Estimated) -> None:
        """All is known already."""

    @torch.no_grad()
    def sketch(self, model: nn.Module, sample: Prompt) -> Estimated:
        """A batch of the usual shape without drawing, to plan the memory."""
        actor: Any = model
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        count = self.args.num_generations
        one = self._rollout(actor, [Drawn(sample, [Answer(ids, True)] * count, torch.zeros(0))])
        one.returns = one.values
        return one

    # -- the loss --------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Estimated) -> Loss:
        actor: Any = model
        args, old = self.args, batch.old
        assert old is not None
        assert batch.values is not None
        assert batch.returns is not None
        with routed(actor.policy, batch.batch, args.router_aux_loss_coef) as routers:
            scored = score(actor.policy, batch.batch, temperature=args.temperature)
        ratio = (scored.logprobs - old).exp()
        gains = policy.clipped_losses(
            ratio, ratio, batch.advantages, args.cliprange, args.cliprange
        )
        correction, told = corrected(args, batch, old)
        if correction is not None:
            gains = gains * correction
        values = actor.values(batch.batch, scored.seen)
        misses, held = critic.value_losses(
            values, batch.values, batch.returns, args.cliprange_value
        )
        settings = PolicyLoss(epsilon=args.cliprange)
        told |= policy.clipped_shares(ratio.detach(), batch.advantages, settings)
        told |= {"policy_loss": gains.detach(), "value_loss": misses.detach(),
                 "clip_ratio/value": held.float()}  # fmt: skip
        total = torch.stack([gains.sum(), args.vf_coef * misses.sum()])
        found = Loss(total, {**batch.metrics, **sums_of(told)})
        return routers.beside(found, self.weight(batch)[0])


class PPOTrainer(Trainer):
    """The trainer with the PPO objective; rows and `reward_funcs` as in `GRPOTrainer`.

    `value_model`: None puts a value head beside the policy's own head, on a shared trunk; the
    folder of a saved head takes that up; a sequence classifier with one label, or its name, is a
    critic of its own. `trainer.policy` is the trained policy, also while it runs.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] = (),
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        peft_config: PeftConfig | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        environment_factory: Any = None,
        value_model: nn.Module | str | Path | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, PPOConfig, optimizer, more)
        found = set_up(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class,
            reward_processing_classes, peft_config, args.kl_coef, tools, environment_factory,
            sees=True,
        )  # fmt: skip
        whole = with_critic(found.policy, value_model, peft_config, args)
        if found.draw.placer is not None and not whole.shared:
            raise ConfigError(
                "value_model reads no images: leave it out, for a value head on the policy's trunk"
            )
        self.policy = found.policy
        super().__init__(
            whole,
            args,
            PPO(args, found.draw, reference=found.reference),
            callbacks=callbacks,
            optimizer=optimizer,
            **found.given(),
        )
        found.attach(self)


__all__ = ["PPO", "PPOConfig", "PPOTrainer"]
