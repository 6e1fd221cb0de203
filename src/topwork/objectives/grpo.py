"""GRPO and its relatives: answers are drawn in groups, judged, and compared with their group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.media import ImageTextProcessor
from topwork.objectives import policy
from topwork.objectives.begin import set_up
from topwork.objectives.distill import head_of
from topwork.objectives.draws import (
    Drawn,
    DrawsConfig,
    OverDraws,
    Rollout,
    all_alike,
    collate_answers,
    split,
    sums_of,
)
from topwork.objectives.familiar import SCALES, settled
from topwork.objectives.logprobs import Scored, score, token_logprobs
from topwork.objectives.policy import PolicyLoss
from topwork.objectives.reference import Reference
from topwork.objectives.rewards import RewardFunc
from topwork.objectives.rollouts import Answer, Prompt
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least, one_of
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings
from topwork.training.objective import Loss

ESTIMATORS = ("group", "leave_one_out", "global")


@settings
class GRPOConfig(DrawsConfig):
    """A run of group-relative policy optimisation (arXiv:2402.03300)."""

    num_generations: int = 8
    beta: float = 0.0
    """Weight of the divergence from the start of the run; 0 needs no reference."""
    loss_type: str = "dapo"
    epsilon: float = 0.2
    """Clip from below: a ratio of 1 - ε; for gmpo of exp(-ε)."""
    epsilon_high: float | None = None
    """Clip from above; None: `epsilon`. For cispo the cap of the ratio."""
    delta: float | None = None
    importance_sampling_level: str = "token"
    """"sequence" is GSPO (arXiv:2507.18071)."""
    use_bias_correction_kl: bool = True
    num_iterations: int = 1
    """Passes over the same answers (μ)."""
    scale_rewards: str | bool = "group"
    """Divide advantages by the deviation of the "group", of the "batch", or not ("none"); True and
    False are the first and the last."""
    normalise_rewards_first: bool = False
    """Normalise each reward function in its group before they are summed (GDPO)."""
    advantage: str = "group"
    """Baseline: the mean of the "group", "leave_one_out" (RLOO), or "global" (REINFORCE++)."""
    mask_truncated_completions: bool = False
    """Answers that did not come to an end are not trained."""
    max_resamples: int = 0
    """How often groups whose answers all earn the same are drawn again (dynamic sampling, DAPO)."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    top_entropy_quantile: float = 1.0
    """Share of a draw's tokens, the policy's most uncertain ones, that are trained; all are held to
    the reference (arXiv:2506.01939). Below 1 for one more pass without gradients."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy of these tokens, which is taken off the loss."""
    off_policy_mask_threshold: float | None = None
    """Answers that did badly are left out once the policy has moved away from them: the mean log of
    their tokens' chances when drawn, over the present ones, is above this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale_rewards = SCALES.get(self.scale_rewards, self.scale_rewards)
        one_of("loss_type", self.loss_type, policy.AGGREGATION)
        one_of("importance_sampling_level", self.importance_sampling_level, policy.LEVELS)
        one_of("scale_rewards", self.scale_rewards, policy.SCALES)
        one_of("advantage", self.advantage, ESTIMATORS)
        at_least("num_iterations", self.num_iterations, 1)
        at_least("entropy_coef", self.entropy_coef, 0)
        if not 0 < self.top_entropy_quantile <= 1:
            raise ConfigError(
                f"top_entropy_quantile={self.top_entropy_quantile} must be in (0, 1]: the share of "
                "tokens to train"
            )
        if self.num_generations < 2 and self.advantage != "global":
            raise ConfigError("num_generations must be at least 2: answers are compared")
        if self.loss_type == "vespo" and self.importance_correction.startswith("sequence"):
            raise ConfigError(
                f"importance_correction={self.importance_correction!r}: vespo weighs whole answers "
                "itself; one of none, token_truncate, token_mask"
            )
        if self.loss_type == "gmpo" and (
            self.delta is not None or self.importance_sampling_level != "token"
        ):
            raise ConfigError(
                "gmpo clips each token's ratio and then takes their mean itself: leave delta and "
                "importance_sampling_level out"
            )

    def loss(self) -> PolicyLoss:
        return PolicyLoss(
            self.loss_type, self.epsilon, self.epsilon_high, self.delta,
            self.importance_sampling_level, self.beta, self.use_bias_correction_kl,
            self.sapo_temperature_pos, self.sapo_temperature_neg,
        )  # fmt: skip


@dataclass
class GRPO(OverDraws):
    """The objective."""

    reference: Reference | None = None

    @property
    def passes(self) -> int:
        return self.args.num_iterations

    def weight(self, batch: Rollout) -> Any:
        tokens, longest = len(batch.batch.targets), self.args.max_completion_length
        own = policy.units(self.args.loss_type, batch.answers, tokens, longest)
        if not self.args.entropy_coef:
            return own
        return own, float(tokens if batch.heeded is None else batch.heeded.sum())

    # -- from prompts to micro-batches -----------------------------------------------------------

    def collected(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None
    ) -> list[Rollout]:
        """Draw, judge and compare the answers of a whole step."""
        drawn = self._drawn(model, [p for group in groups for p in group], world is not None)
        rewards = torch.stack([d.rewards for d in drawn])
        advantages = self._advantages(model, drawn, rewards, world or World())
        self.draw.keep(drawn[0], advantages[0])
        found = []
        for part, own in zip(split(groups, drawn), split(groups, advantages)):
            rollout = self._rollout(model, part, own)
            rollout.metrics = self.draw.metrics(part)
            found.append(rollout)
        if self.args.top_entropy_quantile < 1:
            self._heed(model, found, world or World())
        return found

    @torch.no_grad()
    def _heed(self, model: nn.Module, batches: Sequence[Rollout], world: World) -> None:
        """Mark the most uncertain tokens of a whole draw, over all processes."""
        heat, entropies = self.args.temperature, []
        for one in batches:
            scored = score(model, one.batch, temperature=heat)
            one.old = scored.logprobs
            entropies.append(scored.statistics(heat).entropy)
        every, _ = world.gather(torch.cat(entropies))
        least = float(np.quantile(every.cpu().numpy(), 1 - self.args.top_entropy_quantile))
        for one, entropy in zip(batches, entropies):
            one.heeded = entropy >= least
            one.metrics |= sums_of({"entropy": entropy})

    def remember(self, model: nn.Module, batch: Rollout) -> None:
        if batch.old is None:
            batch.old = self._logprobs(model, batch)

    def sketch(self, model: nn.Module, sample: Prompt) -> Rollout:
        """A batch of the usual shape without drawing, to plan the memory."""
        count = self.args.num_generations
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        drawn = Drawn(sample, [Answer(ids, True)] * count, torch.zeros(count, 1))
        return self._rollout(model, [drawn], torch.zeros(1, count))

    def _drawn(self, model: nn.Module, prompts: Sequence[Prompt], training: bool) -> list[Drawn]:
        drawn = self.draw(model, prompts, self.number if training else None)
        for _ in range(self.args.max_resamples if training else 0):
            flat = [i for i, d in enumerate(drawn) if all_alike(d.rewards)]
            if not flat:
                break
            for i, fresh in zip(flat, self.draw(model, [prompts[i] for i in flat])):
                drawn[i] = fresh
        return drawn

    def _advantages(
        self, model: nn.Module, drawn: list[Drawn], rewards: Tensor, world: World
    ) -> Tensor:
        """[P, G] from the rewards [P, G, F]."""
        args, jury = self.args, self.draw.jury
        if args.advantage == "group":
            return policy.group_advantages(
                rewards, jury.weights, args.scale_rewards, args.normalise_rewards_first
            )
        summed = jury.summed(rewards)
        if args.advantage == "leave_one_out":
            return policy.leave_one_out(summed)
        return policy.whitened([summed.flatten()], world)[0].view(summed.shape)

    def _rollout(self, model: nn.Module, drawn: Sequence[Drawn], advantages: Tensor) -> Rollout:
        device = next(model.parameters()).device
        ended_only = self.args.mask_truncated_completions
        batch, sampled = collate_answers(drawn, device, ended_only, self.draw.placer)
        rollout = Rollout(batch, advantages.flatten().to(device), sampled=sampled)
        if self.args.beta and self.reference is not None:
            with self.reference.of(model) as reference:
                rollout.ref = self._logprobs(reference, rollout)
        return rollout

    def _logprobs(self, model: nn.Module, batch: Rollout) -> Tensor:
        return token_logprobs(model, batch.batch, self.args.temperature)

    # -- the loss --------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Rollout) -> Loss:
        with routed(model, batch.batch, self.args.router_aux_loss_coef) as routers:
            scored = score(model, batch.batch, temperature=self.args.temperature)
        found = self.compared(batch, scored.logprobs)
        if not self.args.entropy_coef:
            return routers.beside(found, self.weight(batch))
        entropy = self._entropy(model, scored)
        heeded = entropy if batch.heeded is None else entropy[batch.heeded]
        terms = torch.stack([found.total, -self.args.entropy_coef * heeded.sum()])
        metrics = {**found.metrics, **sums_of({"entropy": entropy.detach()})}
        return routers.beside(Loss(terms, metrics), self.weight(batch)[0])

    def _entropy(self, model: nn.Module, scored: Scored) -> Tensor:
        """Of the policy at each token [N], with gradients: log V - KL(π ‖ uniform)."""
        own = callable(getattr(model, "token_logprobs", None))  # else the logits were seen
        head = head_of(model) if own else lambda logits: logits
        size = head(scored.seen[:1]).shape[-1]
        apart = ops.token_divergence(
            head, scored.seen, lambda rows: rows.new_zeros(len(rows), size), scored.seen.detach(),
            beta=1.0, temperature=self.args.temperature if own else 1.0,
        )  # fmt: skip
        return math.log(size) - apart

    def compared(self, batch: Rollout, new: Tensor) -> Loss:
        """The loss of these answers from the policy's log-probabilities [N]."""
        spread, settings = batch.spread, self.args.loss()
        old = new.detach() if batch.old is None else batch.old
        correction, told = corrected(self.args, batch, old)
        keep, bound = batch.heeded, self.args.off_policy_mask_threshold
        if bound is not None:
            drawn = (
                old if batch.sampled is None else batch.sampled.where(~batch.sampled.isnan(), old)
            )
            near = policy.near_enough(new, drawn, batch.advantages, spread, bound)
            told["off_policy_masked_fraction"] = (~near).float()
            keep = near if keep is None else keep & near
        losses = policy.token_losses(
            new, old, batch.advantages, spread, settings, batch.ref, correction, keep
        )
        ratio = policy.log_ratio(new.detach(), old, spread, settings.level).exp()
        told |= policy.clipped_shares(ratio, spread.over(batch.advantages), settings)
        if batch.ref is not None:
            told["kl"] = policy.kl_k3(new.detach(), batch.ref)
        metrics = {**batch.metrics, **sums_of(told)}
        return Loss(policy.total(losses, spread, settings.loss_type), metrics)


def corrected(args: Any, batch: Any, old: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The weight of each token for where it was drawn [N], and what is told of it."""
    settings = args.correction()
    if settings.mode == "none" or batch.sampled is None:
        return None, {}
    weights, beyond = settings.weights(old, batch.sampled, batch.spread)
    return weights, settings.told(weights, beyond, old, batch.sampled)


class GRPOTrainer(Trainer):
    """The trainer with the GRPO objective.

    `reward_funcs`: functions f(prompts=, completions=, **columns) → numbers or None, sequence
    classifiers with one label, names of such, or "file.py:function". Rows have `prompt`, a text or
    messages; with a model of images in texts and its `AutoProcessor` as `processing_class` they may
    have images, in the messages or in the column `images`.

    `tools`: functions that answers may call. `environment_factory`: makes an environment for each
    answer, whose `reset(**columns)` may add to the prompt, whose other public methods are tools,
    and whose `get_reward()` is a reward; several by name for rows with `environment`.
    """

    objective_class: ClassVar[type[GRPO]] = GRPO
    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    sees: ClassVar[bool] = True
    """Prompts may have images."""

    def __init__(
        self,
        model: nn.Module | str | Path,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] = (),
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        peft_config: PeftConfig | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        environment_factory: Any = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, self.config_class, optimizer, more)
        found = set_up(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class,
            reward_processing_classes, peft_config, args.beta, tools, environment_factory,
            sees=self.sees,
        )  # fmt: skip
        objective = self.objective_class(args, found.draw, reference=found.reference)
        super().__init__(
            found.policy, args, objective, callbacks=callbacks, optimizer=optimizer, **found.given()
        )
        found.attach(self)
