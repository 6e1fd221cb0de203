"""GRPO and its relatives: answers are drawn in groups, judged, and compared with their group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from topwork.data.groups import Group, collate_groups
from topwork.data.packing import Batch
from topwork.data.prepare import Sample
from topwork.errors import ConfigError
from topwork.models import AutoModelForSequenceClassification
from topwork.objectives import policy
from topwork.objectives.logprobs import token_logprobs
from topwork.objectives.policy import PolicyLoss, Spread
from topwork.objectives.reference import Reference, choose_reference
from topwork.objectives.rewards import RewardFunc, check_columns, from_file, judge, name_of
from topwork.objectives.rollouts import (
    Answer,
    Prompt,
    completion,
    read_prompts,
    roll_out,
    sampling_options,
)
from topwork.objectives.setup import adapted, load_pair, named_sets, one_of
from topwork.peft import PeftConfig, PeftModel
from topwork.text import AutoTokenizer, Tokenizer
from topwork.training import Trainer, TrainerCallback, TrainingArguments
from topwork.training.distributed import World
from topwork.training.objective import Loss

COMPLETIONS = "completions.jsonl"
ESTIMATORS = ("group", "leave_one_out", "global")


@dataclass(kw_only=True)
class GRPOConfig(TrainingArguments):
    """A run of group-relative policy optimisation (arXiv:2402.03300).

    `per_device_train_batch_size` counts answers, and must be a multiple of `num_generations`.
    """

    learning_rate: float = 1e-6
    num_generations: int = 8
    max_prompt_length: int | None = None
    """Rows with longer prompts are left out, counted and told."""
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    beta: float = 0.0
    """Weight of the divergence from the start of the run; 0 needs no reference."""
    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """Clip from above; None: `epsilon`. For cispo the cap of the ratio."""
    delta: float | None = None
    importance_sampling_level: str = "token"
    """"sequence" is GSPO (arXiv:2507.18071)."""
    use_bias_correction_kl: bool = True
    num_iterations: int = 1
    """Optimiser steps on the same answers (μ)."""
    scale_rewards: str = "group"
    """Divide advantages by the deviation of the "group", of the "batch", or not ("none")."""
    reward_weights: list[float] | None = None
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
    chat_template: str | None = None
    log_completions: bool = True
    """Keep the first group of each step in completions.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, policy.AGGREGATION)
        one_of("importance_sampling_level", self.importance_sampling_level, policy.LEVELS)
        one_of("scale_rewards", self.scale_rewards, policy.SCALES)
        one_of("advantage", self.advantage, ESTIMATORS)
        for name in ("num_iterations", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_generations < 2 and self.advantage != "global":
            raise ConfigError("num_generations must be at least 2: answers are compared")
        if self.per_device_train_batch_size % self.num_generations:
            raise ConfigError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} counts answers "
                f"and must be a multiple of num_generations={self.num_generations}"
            )

    def loss(self) -> PolicyLoss:
        return PolicyLoss(
            self.loss_type, self.epsilon, self.epsilon_high, self.delta,
            self.importance_sampling_level, self.beta, self.use_bias_correction_kl,
            self.sapo_temperature_pos, self.sapo_temperature_neg,
        )  # fmt: skip


@dataclass
class Rollout:
    """A micro-batch of answers: their `advantages` [A], the log-probabilities [N] under the policy
    that drew them (`old`; None: the present one) and under the reference, and what is told."""

    batch: Batch
    advantages: Tensor
    old: Tensor | None = None
    ref: Tensor | None = None
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        return Spread(self.batch.owners, len(self.advantages))


@dataclass
class Drawn:
    """A prompt with its judged answers; `rewards` [G, F]."""

    prompt: Prompt
    answers: list[Answer]
    rewards: Tensor


@dataclass
class GRPO:
    """The objective. `draws`: its batches are drawn, so a run stops between steps only."""

    args: GRPOConfig
    tokenizer: Tokenizer
    rewards: Sequence[RewardFunc]
    reward_tokenizers: Sequence[Any] = ()
    reference: Reference | None = None
    trainer_state: Callable[[], Any] = lambda: None
    draws: bool = True
    kept: tuple[tuple[int, ...], list[Rollout]] | None = None

    @property
    def answers(self) -> int:
        """Items of the batch size that one prompt stands for."""
        return self.args.num_generations

    @property
    def repeat(self) -> int:
        """Steps that share their samples."""
        return self.args.num_iterations

    def size(self, sample: Prompt) -> int:
        return len(sample) + self.args.num_generations * self.args.max_completion_length

    def weight(self, batch: Rollout) -> float:
        tokens = len(batch.batch.targets)
        longest = self.args.max_completion_length
        return policy.units(self.args.loss_type, len(batch.advantages), tokens, longest)

    def tokens(self, batch: Rollout) -> int:
        return batch.batch.tokens

    def rows(self, batch: Rollout) -> Sequence[int]:
        return batch.batch.rows

    # -- from prompts to micro-batches -----------------------------------------------------------

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None = None
    ) -> list[Rollout]:
        """Draw, judge and compare the answers of a whole step; the same ones for `repeat` steps."""
        key = tuple(p.row for group in groups for p in group)
        if self.kept is not None and self.kept[0] == key and model.training:
            return self.kept[1]
        prompts = [p for group in groups for p in group]
        drawn = self._drawn(model, prompts)
        found = self._rollouts(model, groups, drawn, world or World())
        if self.repeat > 1 and model.training:
            with torch.no_grad():
                for rollout in found:
                    rollout.old = token_logprobs(model, rollout.batch)
            self.kept = (key, found)
        return found

    def sketch(self, model: nn.Module, sample: Prompt) -> Rollout:
        """A batch of the usual shape without drawing, to plan the memory."""
        count = self.args.num_generations
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        drawn = Drawn(sample, [Answer(ids, True)] * count, torch.zeros(count, 1))
        return self._rollout(model, [drawn], torch.zeros(1, count))

    def _drawn(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Drawn]:
        drawn = self._judged(model, prompts)
        for _ in range(self.args.max_resamples if model.training else 0):
            flat = [i for i, d in enumerate(drawn) if _all_alike(d.rewards)]
            if not flat:
                break
            for i, again in zip(flat, self._judged(model, [prompts[i] for i in flat])):
                drawn[i] = again
        return drawn

    def _judged(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Drawn]:
        options = sampling_options(self.args, self.tokenizer)
        count = self.args.num_generations
        answers = roll_out(model, prompts, count, options)
        said = [
            completion(prompt, answer, self.tokenizer)
            for prompt, row in zip(prompts, answers)
            for answer in row
        ]
        rewards = judge(self.rewards, said, self.trainer_state(), self.reward_tokenizers)
        parts = rewards.split(count)
        return [Drawn(*parts_of) for parts_of in zip(prompts, answers, parts)]

    def _rollouts(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], drawn: list[Drawn], world: World
    ) -> list[Rollout]:
        rewards = torch.stack([d.rewards for d in drawn])  # [P, G, F]
        advantages = self._advantages(model, drawn, rewards, world)
        found, at = [], 0
        for group in groups:
            part = slice(at, at + len(group))
            rollout = self._rollout(model, drawn[part], advantages[part])
            rollout.metrics = self._metrics(drawn[part], rewards[part])
            found.append(rollout)
            at += len(group)
        self._keep(drawn[0], advantages[0])
        return found

    def _advantages(
        self, model: nn.Module, drawn: list[Drawn], rewards: Tensor, world: World
    ) -> Tensor:
        args = self.args
        weights = torch.tensor(args.reward_weights or [1.0] * rewards.shape[-1])
        if args.advantage == "group":
            return policy.group_advantages(
                rewards, weights, args.scale_rewards, args.normalise_rewards_first
            )
        summed = (rewards * weights).nansum(-1)
        if args.advantage == "leave_one_out":
            return policy.leave_one_out(summed)
        flat = summed.flatten().tolist()
        count, first = world.total(len(flat), sum(flat))
        (second,) = world.total(sum((x - first / count) ** 2 for x in flat))
        return (summed - first / count) / ((second / max(1.0, count - 1)) ** 0.5 + 1e-8)

    def _rollout(self, model: nn.Module, drawn: Sequence[Drawn], advantages: Tensor) -> Rollout:
        groups = [Group(d.prompt.row, d.prompt.ids, tuple(map(self._sample, d.answers)))
                  for d in drawn]  # fmt: skip
        device = next(model.parameters()).device
        rollout = Rollout(collate_groups(groups).to(device), advantages.flatten().to(device))
        if self.args.beta and self.reference is not None:
            with self.reference.of(model) as reference:
                rollout.ref = token_logprobs(reference, rollout.batch)
        return rollout

    def _sample(self, answer: Answer) -> Sample:
        trained = answer.ended or not self.args.mask_truncated_completions
        ids = np.asarray(answer.ids, np.int32)
        return Sample(-1, ids, np.full(len(ids), trained))

    # -- the loss --------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Rollout) -> Loss:
        new, spread, settings = token_logprobs(model, batch.batch), batch.spread, self.args.loss()
        old = new.detach() if batch.old is None else batch.old
        losses = policy.token_losses(new, old, batch.advantages, spread, settings, batch.ref)
        metrics = dict(batch.metrics)
        ratio = policy.log_ratio(new.detach(), old, spread, settings.level).exp()
        told = policy.clipped_shares(ratio, spread.over(batch.advantages), settings)
        if batch.ref is not None:
            told["kl"] = policy.kl_k3(new.detach(), batch.ref)
        metrics |= {name: (float(v.sum()), float(v.numel())) for name, v in told.items()}
        return Loss(policy.total(losses, spread, settings.loss_type), metrics)

    def _metrics(self, drawn: Sequence[Drawn], rewards: Tensor) -> dict[str, tuple[float, float]]:
        """Sums and counts over the answers of a micro-batch."""
        weights = torch.tensor(self.args.reward_weights or [1.0] * rewards.shape[-1])
        summed = (rewards * weights).nansum(-1)
        answers = [a for d in drawn for a in d.answers]
        sizes = [len(a.ids) for a in answers]
        found: dict[str, Tensor] = {
            "reward": summed,
            "reward_std": policy.nan_std(summed, 1),
            "frac_reward_zero_std": torch.tensor([float(_all_alike(d.rewards)) for d in drawn]),
            "completions/mean_length": torch.tensor(sizes, dtype=torch.float32),
            "completions/clipped_ratio": torch.tensor([float(not a.ended) for a in answers]),
        }
        for index, func in enumerate(self.rewards):
            values = rewards[..., index]
            found[f"rewards/{name_of(func)}/mean"] = values[~values.isnan()]
        return {name: (float(v.sum()), float(v.numel())) for name, v in found.items()}

    def _keep(self, drawn: Drawn, advantages: Tensor) -> None:
        state = self.trainer_state()
        if not self.args.log_completions or state is None:
            return
        entry = {
            "step": state.global_step,
            "row": drawn.prompt.row,
            "prompt": drawn.prompt.given,
            "completions": [self.tokenizer.decode(a.ids) for a in drawn.answers],
            "rewards": [[None if x != x else x for x in row] for row in drawn.rewards.tolist()],
            "advantages": advantages.tolist(),
        }
        path = Path(self.args.output_dir) / COMPLETIONS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")


def _all_alike(rewards: Tensor) -> bool:
    """Whether a group [G, F] teaches nothing: its summed rewards are the same."""
    summed = rewards.nansum(-1)
    return bool((summed - summed[0]).abs().max() < 1e-8)


class GRPOTrainer(Trainer):
    """The trainer with the GRPO objective.

    `reward_funcs`: functions f(prompts=, completions=, **columns) → numbers or None, sequence
    classifiers with one label, names of such, or "file.py:function". Rows have `prompt`, a text or
    messages.
    """

    objective_class: ClassVar[type[GRPO]] = GRPO
    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig

    def __init__(
        self,
        model: nn.Module | str | Path,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] = (),
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = args or self.config_class()
        model, tokenizer = load_pair(model, processing_class, args)
        if train_dataset is None:
            raise ConfigError("GRPOTrainer needs train_dataset: rows with `prompt`")
        several = isinstance(reward_funcs, (list, tuple))
        listed: list[Any] = list(reward_funcs) if several else [reward_funcs]
        if not listed:
            raise ConfigError("GRPOTrainer needs reward_funcs (on the command line: --reward)")
        funcs, tokenizers = _reward_models(listed, reward_processing_classes)
        if args.reward_weights is not None and len(args.reward_weights) != len(funcs):
            raise ConfigError(f"{len(args.reward_weights)} reward_weights for {len(funcs)} rewards")
        train, long = read_prompts(train_dataset, tokenizer, args.max_prompt_length)
        check_columns(funcs, list(train[0].columns))
        evals: dict[str, Sequence[Any]] = {
            name: read_prompts(rows, tokenizer, args.max_prompt_length)[0]
            for name, rows in named_sets(eval_dataset).items()
        }
        reference = _start(model, peft_config) if args.beta else None
        objective = self.objective_class(args, tokenizer, funcs, tokenizers, reference)
        notes = [f"prompts: {len(train):,} rows, {args.num_generations} answers to each"]
        if long:
            notes.append(f"{long} rows dropped, prompts over {args.max_prompt_length} tokens")
        super().__init__(
            adapted(model, peft_config),
            args,
            objective,
            train,
            evals,
            tokenizer=tokenizer,
            callbacks=callbacks,
            optimizer=optimizer,
            data_fingerprint=_fingerprint(train),
            notes=notes,
        )
        objective.trainer_state = lambda: self.state


def _start(model: nn.Module, config: PeftConfig | None) -> Reference:
    """The policy as it is at the start: the bare base below a new adapter, else a copy."""
    if config is not None and not isinstance(model, PeftModel):
        return Reference()
    return choose_reference(model, None, False, False, False)


def _reward_models(
    given: Sequence[RewardFunc | str], tokenizers: Any
) -> tuple[list[RewardFunc], list[Any]]:
    """Names of reward models loaded; each model with its tokenizer."""
    listed = tokenizers if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(given)
    funcs: list[RewardFunc] = []
    found: list[Any] = []
    for func, tokenizer in zip(given, listed, strict=True):
        if isinstance(func, str) and ".py:" in func:
            func = from_file(func)
        elif isinstance(func, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(func)
            func = AutoModelForSequenceClassification.from_pretrained(func, num_labels=1)
        if isinstance(func, nn.Module) and tokenizer is None:
            raise ConfigError("a reward model needs its tokenizer: reward_processing_classes=…")
        funcs.append(func)
        found.append(tokenizer)
    return funcs, found


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.ids.tobytes())
    return digest.hexdigest()
