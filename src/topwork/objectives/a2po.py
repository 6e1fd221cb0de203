"""A*-PO (arXiv:2505.20686): the policy's log-ratio to its start is regressed onto what an answer
earned above what its prompt is worth, which answers of the start tell before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from topwork.errors import TrainingError
from topwork.media import ImageTextProcessor
from topwork.objectives.answers import means
from topwork.objectives.begin import set_up
from topwork.objectives.draws import (
    Drawn,
    DrawsConfig,
    OverDraws,
    Rollout,
    collate_answers,
    split,
)
from topwork.objectives.familiar import settled
from topwork.objectives.logprobs import token_logprobs
from topwork.objectives.online import no_correction, write_as
from topwork.objectives.reference import Reference
from topwork.objectives.rewards import RewardFunc
from topwork.objectives.rollouts import Answer, EngineWriter, Prompt, SeeingWriter, sampling_options
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings
from topwork.training.trainer import TrainOutput

VALUES = "values.safetensors"


@settings
class A2POConfig(DrawsConfig):
    """A run of A*-PO."""

    num_generations: int = 1
    num_value_samples: int = 8
    """Answers of the start to each prompt, by which its worth is estimated before training."""
    beta1: float = 0.5
    """Temperature of the estimate: near 0 the best answer counts, far above the rewards their
    mean."""
    beta2: float = 1e-3
    """How strongly the policy is held to its start: a log-ratio counts so much reward."""
    filter_all_incorrect: bool = True
    """Leave out the prompts of which no answer of the start earned anything."""
    importance_correction: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_value_samples", self.num_value_samples, 1)
        at_least("beta1", self.beta1, 0, above=True)
        at_least("beta2", self.beta2, 0, above=True)
        no_correction(self, "a regression holds whoever wrote the answers")


def optimal_values(rewards: Tensor, beta: float) -> Tensor:
    """V*(x) = β·log mean exp(r/β) over the start's answers [P, S] to each prompt: [P]."""
    return beta * ((rewards / beta).logsumexp(1) - math.log(rewards.shape[1]))


def name_of(prompt: Prompt) -> tuple[bytes, str]:
    """What tells prompts apart: their tokens, and what else their rows say to who judges."""
    return prompt.ids.tobytes(), repr(sorted(prompt.columns.items()))


@dataclass
class A2PO(OverDraws):
    """The objective. The units are answers; `values`: what each prompt is worth, by its name."""

    reference: Reference = field(default_factory=Reference)
    values: dict[tuple[bytes, str], float] = field(default_factory=dict)

    def weight(self, batch: Rollout) -> float:
        return batch.answers

    @torch.no_grad()
    def judge_start(
        self, model: nn.Module, prompts: Sequence[Prompt], generator: torch.Generator | None = None
    ) -> Tensor:
        """The rewards [P, S] of answers of the start to each prompt."""
        args = self.args
        writer = self.draw.writer
        if not isinstance(writer, SeeingWriter):  # a server has no start
            writer = EngineWriter(sampling_options(args, self.draw.tokenizer))
        answers = write_as(
            self.reference, model, writer, prompts, args.num_value_samples,
            args.max_completion_length, generator,
        )  # fmt: skip
        drawn = self.draw.judged(prompts, answers)
        return torch.stack([self.draw.jury.summed(one.rewards) for one in drawn])

    def worth(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[float]:
        """What each prompt is worth; of those that are new (of evaluation) it is estimated."""
        names = [name_of(p) for p in prompts]
        new = {name: p for name, p in zip(names, prompts) if name not in self.values}
        if new:
            found = optimal_values(self.judge_start(model, list(new.values())), self.args.beta1)
            self.values |= zip(new, found.tolist())
        return [self.values[name] for name in names]

    def collected(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None
    ) -> list[Rollout]:
        """Draw and judge the answers of a whole step."""
        prompts = [p for group in groups for p in group]
        drawn = self.draw(model, prompts, None if world is None else self.number)
        values = self.worth(model, prompts)
        found = []
        for part, own in zip(split(groups, drawn), split(groups, values)):
            rollout = self._rollout(model, part, own)
            value = {"value": torch.tensor(own), "advantage": rollout.advantages}
            rollout.metrics = {**self.draw.metrics(part), **means(value)}
            found.append(rollout)
        self.draw.keep(drawn[0], self.draw.jury.summed(drawn[0].rewards) - values[0])
        return found

    def _rollout(
        self, model: nn.Module, drawn: Sequence[Drawn], values: Sequence[float]
    ) -> Rollout:
        device = next(model.parameters()).device
        batch, _ = collate_answers(drawn, device, placer=self.draw.placer)
        gains = [self.draw.jury.summed(one.rewards) - v for one, v in zip(drawn, values)]
        with self.reference.of(model) as reference:
            start = token_logprobs(reference, batch, self.args.temperature)
        return Rollout(batch, torch.cat(gains).to(device), ref=start)

    def remember(self, model: nn.Module, batch: Rollout) -> None:
        """The loss compares with the start alone."""

    def sketch(self, model: nn.Module, sample: Prompt) -> Rollout:
        """A batch of the usual shape without drawing, to plan the memory."""
        count = self.args.num_generations
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        rewards = torch.zeros(count, len(self.draw.jury.names))
        return self._rollout(model, [Drawn(sample, [Answer(ids, True)] * count, rewards)], [0.0])

    def loss(self, model: nn.Module, batch: Rollout) -> Loss:
        """(β·log π/π_start - (reward - V*))² of each answer, summed."""
        with routed(model, batch.batch, self.args.router_aux_loss_coef) as routers:
            new = token_logprobs(model, batch.batch, self.args.temperature)
        assert batch.ref is not None
        implied = self.args.beta2 * batch.spread.sums(new - batch.ref)
        losses = (implied - batch.advantages) ** 2
        found = Loss(losses.sum(), {**batch.metrics, **means({"implicit_reward": implied})})
        return routers.beside(found, self.weight(batch))


class A2POTrainer(Trainer):
    """The trainer with the A*-PO objective; rows and `reward_funcs` as in `GRPOTrainer`.

    Before the first step the start's answers are drawn and judged; what they say of each prompt is
    kept in output_dir for a run that is resumed.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] = (),
        args: A2POConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        peft_config: PeftConfig | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, A2POConfig, optimizer, more)
        found = set_up(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class,
            reward_processing_classes, peft_config, held=1.0, sees=True,
        )  # fmt: skip
        assert found.reference is not None
        objective = A2PO(args, found.draw, reference=found.reference)
        super().__init__(
            found.policy, args, objective, callbacks=callbacks, optimizer=optimizer, **found.given()
        )
        found.attach(self)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Estimate what the prompts are worth, unless that is known, and run to the end.

        Raises TrainingError, as well as for what stops any run, where no prompt is left.
        """
        objective: Any = self.objective
        if not objective.values:
            self._estimate(objective, bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint)

    def _estimate(self, objective: A2PO, resumed: bool) -> None:
        prompts: Sequence[Any] = self.train_data
        path = Path(self.args.output_dir) / VALUES
        rewards = _kept(path, self.state.data) if resumed else None
        if rewards is None:
            rewards = _drawn_by_all(
                lambda part, generator: objective.judge_start(self.model, part, generator),
                prompts, self.args.per_device_train_batch_size, self.args.seed, self.world,
            )  # fmt: skip
            if self.world.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                staged = path.with_suffix(".part")
                save_file({"rewards": rewards}, staged, {"data": self.state.data})
                staged.replace(path)
            self.world.wait()
        args: Any = self.args
        values = optimal_values(rewards, args.beta1)
        objective.values |= zip(map(name_of, prompts), values.tolist())
        hopeless = (rewards == 0).all(1) & args.filter_all_incorrect
        self.train_data = [p for p, lost in zip(prompts, hopeless.tolist()) if not lost]
        self.notes.append(
            f"worth of {len(prompts):,} prompts by {rewards.shape[1]} answers each: "
            f"{float(values.mean()):.3f} on average, {float(rewards.mean()):.3f} earned"
        )
        if hopeless.any():
            self.notes.append(f"{int(hopeless.sum())} of them dropped, no answer earned anything")
        if not self.train_data:
            raise TrainingError(
                f"no answer of the start to any of the {len(prompts)} prompts earned anything: "
                "raise num_value_samples, or set filter_all_incorrect=False"
            )


def _kept(path: Path, data: str) -> Tensor | None:
    """The rewards that an earlier part of this run kept."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor("rewards") if (file.metadata() or {}).get("data") == data else None


def _drawn_by_all(
    judge: Callable[[Sequence[Prompt], torch.Generator], Tensor], prompts: Sequence[Prompt],
    size: int, seed: int, world: World,
) -> Tensor:  # fmt: skip
    """The rewards [P, S] of all `prompts`, of which each process judges a share."""
    generator = torch.Generator().manual_seed(seed + world.rank)
    share = -(-len(prompts) // world.size)
    own = prompts[world.rank * share : (world.rank + 1) * share]
    parts = [judge(own[at : at + size], generator) for at in range(0, len(own), size)]
    found = torch.cat(parts) if parts else torch.zeros(0)
    return world.gather(found)[0].cpu()


__all__ = ["A2PO", "A2POConfig", "A2POTrainer"]
