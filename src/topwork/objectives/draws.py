"""What the objectives over drawn answers share: settings, drawing and judging, steps that share
their answers, and the set-up of their trainers."""

from __future__ import annotations

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
from topwork.media.placed import Placer
from topwork.objectives import kept, policy
from topwork.objectives.ahead import Ahead
from topwork.objectives.episodes import Stage
from topwork.objectives.familiar import DRAWS, Familiar
from topwork.objectives.language import LanguageConfig
from topwork.objectives.policy import Correction, Spread
from topwork.objectives.rewards import Jury
from topwork.objectives.rollouts import (
    Answer,
    Prompt,
    Writer,
    completion,
    roll_out,
)
from topwork.objectives.setup import at_least, one_of
from topwork.objectives.sighted import reading
from topwork.text import Tokenizer
from topwork.training import TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings

COMPLETIONS = "completions.jsonl"
Metrics = dict[str, tuple[float, float]]


@settings
class SamplingConfig(LanguageConfig):
    """What runs over the policy's own answers share.

    `per_device_train_batch_size` counts answers, and must be a multiple of `num_generations`.
    """

    familiar: ClassVar[dict[str, Familiar]] = DRAWS

    learning_rate: float = 1e-6
    disable_dropout: bool = True
    num_generations: int = 1
    """Answers to each prompt."""
    max_prompt_length: int | None = None
    """Rows with longer prompts are left out, counted and told."""
    max_completion_length: int = 256
    temperature: float = 1.0
    """The policy is the model at this temperature, in drawing and in training."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    chat_template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "max_completion_length"):
            at_least(name, getattr(self, name), 1)
        if self.per_device_train_batch_size % self.num_generations:
            raise ConfigError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} counts answers "
                f"and must be a multiple of num_generations={self.num_generations}: groups stay "
                "together, so take fewer gradient_accumulation_steps instead"
            )


@settings
class DrawsConfig(SamplingConfig):
    """What runs over judged answers of the policy share."""

    num_mini_batches: int = 1
    """Optimiser steps that share one draw, each with its part of the micro-batches; divides
    `gradient_accumulation_steps`."""
    reward_weights: list[float] | None = None
    missing_eos_penalty: float | None = None
    """Taken off the reward of an answer that does not end within `max_completion_length`."""
    importance_correction: str = "token_truncate"
    """How the loss makes up for answers that come from another distribution than the trainer's
    policy (another kernel, a cut by top-k, older weights): their ratio is truncated, or tokens
    beyond the bounds are masked, for each token or whole answers: none, token_truncate,
    token_mask, sequence_truncate, sequence_mask."""
    importance_correction_max: float | None = 3.0
    importance_correction_min: float | None = None
    rollout_server: str | None = None
    """Address of a vLLM server that writes the answers, such as http://localhost:8000; see
    topwork/objectives/server.py for how to start it. None: the engine in this process."""
    rollout_timeout: float = 600.0
    """Seconds after which a server that does not answer stops the run."""
    steps_per_generation: int | None = None
    """Micro-batches that share one draw, where `gradient_accumulation_steps` make an optimiser
    step: another way to set both it and `num_mini_batches`."""
    max_staleness: int = 0
    """Draws that a thread makes ahead while training goes on, each under the weights of the time:
    answers are at most so many draws old. 0: drawn when they are needed."""
    max_tool_calling_iterations: int | None = None
    """How often an answer may call tools; None: until it is too long."""
    log_completions: bool = True
    """Keep the first group of each step in completions.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("importance_correction", self.importance_correction, policy.CORRECTIONS)
        at_least("num_mini_batches", self.num_mini_batches, 1)
        _share_draws(self)
        at_least("max_tool_calling_iterations", self.max_tool_calling_iterations, 1)
        at_least("max_staleness", self.max_staleness, 0)
        at_least("rollout_timeout", self.rollout_timeout, 0, above=True)
        if self.gradient_accumulation_steps % self.num_mini_batches:
            raise ConfigError(
                f"num_mini_batches={self.num_mini_batches} must divide "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )

    def correction(self) -> Correction:
        return Correction(
            self.importance_correction,
            self.importance_correction_min,
            self.importance_correction_max,
        )


def _share_draws(args: DrawsConfig) -> None:
    """Let `steps_per_generation` say how long one draw serves."""
    shared, steps = args.steps_per_generation, args.gradient_accumulation_steps
    if shared is None:
        return
    if shared < 1 or shared % steps or args.num_mini_batches > 1:
        raise ConfigError(
            f"steps_per_generation={shared} must be a multiple of "
            f"gradient_accumulation_steps={steps}, and num_mini_batches left out"
        )
    args.num_mini_batches, args.gradient_accumulation_steps = shared // steps, shared
    args.steps_per_generation = None


@dataclass
class Drawn:
    """A prompt with its judged answers; `rewards` [G, F]."""

    prompt: Prompt
    answers: list[Answer]
    rewards: Tensor
    staleness: int = 0
    """Optimiser steps since the weights that drew them."""


@dataclass
class Rollout:
    """A micro-batch of A answers: their `advantages` [A], the log-probabilities [N] under the
    policy when they were drawn (`old`; None: the present one), under their sampler and under the
    reference, and what is told."""

    batch: Batch
    advantages: Tensor
    old: Tensor | None = None
    ref: Tensor | None = None
    sampled: Tensor | None = None
    metrics: Metrics = field(default_factory=dict)
    heeded: Tensor | None = None
    """Which tokens [N] are uncertain enough to be trained; None: all."""

    @property
    def answers(self) -> int:
        return sum(len(n) - 1 if isinstance(n, tuple) else 1 for n in self.batch.lengths)

    @property
    def spread(self) -> Spread:
        return Spread(self.batch.owners, self.answers)


@dataclass
class Draw:
    """Draws answers to prompts and has them judged."""

    args: DrawsConfig
    tokenizer: Tokenizer
    jury: Jury
    writer: Writer
    stages: Sequence[Stage] = ()
    """Several, if rounds are drawn while others are judged: each has environments of its own."""
    ahead: Ahead | None = None
    count: int | None = None
    """Answers to each prompt; None: as the settings say."""
    trainer_state: Callable[[], Any] = lambda: None
    placer: Placer | None = None
    """Reads the images of prompts, for a model that takes some."""

    @property
    def step(self) -> int:
        """How many optimiser steps were taken."""
        state = self.trainer_state()
        return 0 if state is None else state.global_step

    def __call__(
        self, model: nn.Module, prompts: Sequence[Prompt], number: int | None = None
    ) -> list[Drawn]:
        """The judged answers to `prompts`, those of round `number` of the training if it is given.

        Raises TrainingError as `judge` does.
        """
        staleness, answers = self.answers(model, prompts, number)
        return self.judged(prompts, answers, staleness)

    def answers(
        self, model: nn.Module, prompts: Sequence[Prompt], number: int | None
    ) -> tuple[int, list[list[Answer]]]:
        """The answers to each prompt, and how many steps the weights behind them are old."""
        if number is not None and self.ahead is not None:
            return self.ahead.take(model, number, self.step)
        self.writer.follow(model, self.step)
        return 0, self.play(self.writer, prompts, 0, None, model)

    def judged(
        self, prompts: Sequence[Prompt], answers: Sequence[list[Answer]], staleness: int = 0
    ) -> list[Drawn]:
        """Each prompt with its answers and their rewards."""
        said = [
            completion(prompt, answer, self.tokenizer)
            for prompt, row in zip(prompts, answers)
            for answer in row
        ]
        rewards = self.jury.judge(said, self.trainer_state()).split(len(answers[0]))
        return [Drawn(*parts, staleness) for parts in zip(prompts, answers, rewards)]

    def play(
        self, writer: Writer, prompts: Sequence[Prompt], number: int,
        generator: torch.Generator | None, model: nn.Module | None = None,
    ) -> list[list[Answer]]:  # fmt: skip
        """The answers to `prompts`, of one turn or on the round's stage."""
        count = self.count or self.args.num_generations
        limit = self.args.max_completion_length
        if not self.stages:
            return roll_out(writer, model, prompts, count, limit, generator)
        stage = self.stages[number % len(self.stages)]
        return stage.play(writer, model, prompts, count, limit, generator)

    def attach(self, trainer: Any) -> None:
        """Let `trainer` say where the run stands, and what comes next."""
        self.trainer_state = lambda: trainer.state
        if self.ahead is None:
            return

        def upcoming(number: int) -> Sequence[Prompt] | None:
            step = number * trainer.objective.repeat
            if step >= trainer.state.max_steps:
                return None
            return [trainer.train_data[i] for g in trainer.sampler.groups(step) for i in g]

        self.ahead.upcoming = upcoming
        trainer.callbacks.append(_Restart(self.ahead))

    def metrics(self, drawn: Sequence[Drawn]) -> Metrics:
        """Sums and counts over the answers of a micro-batch."""
        rewards = torch.stack([d.rewards for d in drawn])
        summed = self.jury.summed(rewards)
        answers = [a for d in drawn for a in d.answers]
        sizes = [a.written for a in answers]
        found: dict[str, Tensor] = {
            "reward": summed,
            "completions/mean_length": torch.tensor(sizes, dtype=torch.float32),
            "completions/clipped_ratio": torch.tensor([float(not a.ended) for a in answers]),
        }
        if self.args.num_generations > 1:
            found["reward_std"] = policy.nan_std(summed, 1)
            alike = [float(all_alike(d.rewards)) for d in drawn]
            found["frac_reward_zero_std"] = torch.tensor(alike)
        if self.ahead is not None:
            late = torch.tensor([float(d.staleness) for d in drawn])
            found["sampling/staleness"] = late
        if self.stages:
            calls, failures = sum(a.calls for a in answers), sum(a.failures for a in answers)
            found["tools/call_frequency"] = torch.tensor([float(a.calls) for a in answers])
            failed = torch.arange(calls) < failures
            found["tools/failure_frequency"] = failed.float()
        for index, name in enumerate(self.jury.names):
            values = rewards[..., index]
            found[f"rewards/{name}/mean"] = values[~values.isnan()]
        return sums_of(found)

    def keep(self, drawn: Drawn, advantages: Tensor) -> None:
        """Write a group into completions.jsonl, if that is asked for."""
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


class _Restart(TrainerCallback):
    """Each run begins with nothing drawn, and leaves no thread behind."""

    def __init__(self, ahead: Ahead) -> None:
        self.ahead = ahead

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ahead.stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ahead.stop()


def sums_of(values: dict[str, Tensor]) -> Metrics:
    """Each tensor as its sum and its size."""
    return {name: (float(v.sum()), float(v.numel())) for name, v in values.items()}


def all_alike(rewards: Tensor) -> bool:
    """Whether a group [G, F] teaches nothing: its summed rewards are the same."""
    summed = rewards.nansum(-1)
    return bool((summed - summed[0]).abs().max() < 1e-8)


def collate_answers(
    drawn: Sequence[Drawn], device: torch.device, ended_only: bool = False,
    placer: Placer | None = None,
) -> tuple[Batch, Tensor]:  # fmt: skip
    """The micro-batch of these answers, and the samplers' log-probabilities of what is trained.

    Answers share their prompt, unless an environment gave them prompts of their own. TrainingError
    for an image that `placer` cannot read.
    """
    groups, sampled = [], []
    for one in drawn:
        prompts = [one.prompt.ids if a.prompt is None else a.prompt for a in one.answers]
        samples: list[Sample] = []
        for k, answer in enumerate(one.answers):
            ids = np.asarray(answer.ids, np.int32)
            trained = np.full(len(ids), answer.ended or not ended_only)
            if answer.own is not None:
                trained &= np.asarray(answer.own)
            if k and not np.array_equal(prompts[k], prompts[k - 1]):
                groups.append(Group(one.prompt.row, prompts[k - 1], tuple(samples)))
                samples = []
            samples.append(Sample(-1, ids, trained))
            sampled += np.asarray(answer.sampled, np.float32)[trained].tolist()
        seen = one.prompt.images
        groups.append(Group(one.prompt.row, prompts[-1], tuple(samples), prompt_images=seen))
    with reading():
        batch = collate_groups(groups, placer)
    return batch.to(device), torch.tensor(sampled, device=device)


@dataclass
class OverDraws:
    """The part of an objective over drawn answers that does not depend on its loss.

    `repeat` steps share the samples and answers of one draw: `passes` over all of it, each in
    `num_mini_batches` steps. `draws`: a run stops between steps only.
    """

    args: Any
    draw: Draw
    kind: type[Any] = Rollout
    draws: bool = True
    kept: tuple[int, list[Any]] | None = None

    @property
    def passes(self) -> int:
        return 1

    @property
    def answers(self) -> int:
        """Items of the batch size that one prompt stands for."""
        return self.args.num_generations

    @property
    def repeat(self) -> int:
        return self.passes * self.args.num_mini_batches

    def size(self, sample: Prompt) -> int:
        return len(sample) + self.args.num_generations * self.args.max_completion_length

    def tokens(self, batch: Any) -> int:
        return batch.batch.tokens

    def rows(self, batch: Any) -> Sequence[int]:
        return batch.batch.rows

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None = None
    ) -> list[Any]:
        """Draw the answers of a whole draw, or take this step's part of those at hand."""
        if self.repeat == 1 or world is None:
            return self.collected(model, groups, world)
        step = self.draw.step
        if self.kept is None or self.kept[0] != self.number:
            found = self.collected(model, groups, world)
            with torch.no_grad():
                for one in found:
                    self.remember(model, one)
            self.kept = (self.number, found)
        shares = self.args.num_mini_batches
        found = self.kept[1]
        part = found[step % shares :: shares] or [found[step % len(found)]]
        device = next(model.parameters()).device
        return [kept.moved(one, device) for one in part]

    @property
    def number(self) -> int:
        """The draw that the present step belongs to."""
        return self.draw.step // self.repeat

    def collected(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None
    ) -> list[Any]:
        """Fresh micro-batches; `world` is None outside of training."""
        raise NotImplementedError

    def remember(self, model: nn.Module, batch: Any) -> None:
        """Note what the present policy says of `batch`, for steps after it has changed."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return {} if self.kept is None else kept.packed(*self.kept)

    def load_state(self, found: dict[str, Tensor]) -> None:
        self.kept = kept.unpacked(found, self.kind)


def split(groups: Sequence[Sequence[Any]], items: Any) -> list[Any]:
    """`items`, one for each sample of `groups` in order, in the same groups."""
    found, at = [], 0
    for group in groups:
        found.append(items[at : at + len(group)])
        at += len(group)
    return found
