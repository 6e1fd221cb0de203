"""Self-distillation (SDFT, arXiv:2601.19897): the model that was shown more teaches the one that
was not, on the latter's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch
from topwork.data.prepare import Sample
from topwork.data.rows import read_rows
from topwork.errors import ConfigError, DataError
from topwork.objectives.answers import Metrics, means
from topwork.objectives.begin import describe_prompts, prompts_fingerprint, quoted
from topwork.objectives.distill import head_of, seen_at
from topwork.objectives.draws import Drawn, SamplingConfig, collate_answers
from topwork.objectives.familiar import settled
from topwork.objectives.reference import FollowPolicy, Reference, choose_reference
from topwork.objectives.rollouts import (
    Answer,
    EngineWriter,
    Prompt,
    read_prompts,
    roll_out,
    sampling_options,
)
from topwork.objectives.routing import routed
from topwork.objectives.setup import adapted, at_least, load_pair, named_sets, one_of
from topwork.objectives.vocabulary import added_ids
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings

TEACHERS = ("start", "self", "ema")
TEMPLATE = "{prompt}\n\nThis is a good answer:\n{privileged_context}\n\nAnswer in your own words."


@settings
class SelfDistillationConfig(SamplingConfig):
    """A run of self-distillation. Rows have `prompt` and `privileged_context`, which the teacher
    alone reads."""

    beta: float = 1.0
    """0: KL(teacher ‖ student); 1: KL(student ‖ teacher); between: Jensen-Shannon."""
    teacher: str = "start"
    """The weights that teach: those of the "start", the student's of the moment ("self"), or such
    that follow them ("ema")."""
    teacher_prompt_template: str = TEMPLATE
    """The teacher's (last) message, from {prompt} and {privileged_context}."""
    ref_model_mixup_alpha: float = 0.05
    """The student's share in each mixture, with "ema"."""
    ref_model_sync_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"beta={self.beta} must be in [0, 1]")
        one_of("teacher", self.teacher, TEACHERS)
        at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1)
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ConfigError(
                f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} must be in [0, 1]"
            )
        for name in ("{prompt}", "{privileged_context}"):
            if name not in self.teacher_prompt_template:
                raise ConfigError(f"teacher_prompt_template lacks {name}")


@dataclass(frozen=True)
class Advised(Prompt):
    """A prompt, and as `teacher` the one that the teacher reads."""

    teacher: np.ndarray


@dataclass
class TwoViews:
    """The same answers behind the student's prompts and behind the teacher's."""

    batch: Batch
    teacher: Batch
    metrics: Metrics


@dataclass
class SelfDistillation:
    """The divergence at each token that the student wrote, summed."""

    args: SelfDistillationConfig
    writer: EngineWriter
    teacher: Reference
    policy: nn.Module | None = None
    draws: bool = True

    @property
    def answers(self) -> int:
        """Items of the batch size that one prompt stands for."""
        return self.args.num_generations

    def state(self) -> dict[str, Tensor]:
        return {} if self.policy is None else self.teacher.state(self.policy)

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Advised]], world: World | None = None
    ) -> list[TwoViews]:
        """Draw the student's answers to the prompts of a whole step."""
        prompts = [p for group in groups for p in group]
        count, limit = self.args.num_generations, self.args.max_completion_length
        found = iter(roll_out(self.writer, model, prompts, count, limit))
        return [_views(model, group, [next(found) for _ in group]) for group in groups]

    def sketch(self, model: nn.Module, sample: Advised) -> TwoViews:
        """A batch of the usual shape without drawing, to plan the memory."""
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        return _views(model, [sample], [[Answer(ids, True)] * self.args.num_generations])

    def size(self, sample: Advised) -> int:
        longest = max(len(sample.ids), len(sample.teacher))
        return longest + self.args.num_generations * self.args.max_completion_length

    def weight(self, batch: TwoViews) -> float:
        return len(batch.batch.targets)

    def tokens(self, batch: TwoViews) -> int:
        return batch.batch.tokens

    def rows(self, batch: TwoViews) -> Sequence[int]:
        return batch.batch.rows

    def prompt(self, sample: Advised) -> Sample:
        """The one that the student reads."""
        return sample.sample()

    def loss(self, model: nn.Module, batch: TwoViews) -> Loss:
        with routed(model, batch.batch, self.args.router_aux_loss_coef) as routers:
            seen = seen_at(model, batch.batch)
        with self.teacher.of(model) as teacher:
            wanted = seen_at(teacher, batch.teacher)
            head = head_of(teacher)
        apart = ops.token_divergence(
            head_of(model), seen, head, wanted, self.args.beta, self.args.temperature
        )
        found = Loss(apart.sum(), {**batch.metrics, **means({"divergence": apart})})
        return routers.beside(found, self.weight(batch))


def _views(
    model: nn.Module, prompts: Sequence[Advised], answers: Sequence[list[Answer]]
) -> TwoViews:
    device = next(model.parameters()).device
    none = torch.zeros(0)
    pairs = list(zip(prompts, answers))
    own, _ = collate_answers([Drawn(p, a, none) for p, a in pairs], device)
    advised = [Drawn(replace(p, ids=p.teacher), a, none) for p, a in pairs]
    other, _ = collate_answers(advised, device)
    flat = [a for row in answers for a in row]
    metrics = means(
        {
            "completions/mean_length": torch.tensor([float(len(a.ids)) for a in flat]),
            "completions/clipped_ratio": torch.tensor([float(not a.ended) for a in flat]),
        }
    )
    return TwoViews(own, other, metrics)


def read_advised(
    source: Any, tokenizer: Tokenizer, args: SelfDistillationConfig
) -> tuple[list[Advised], int]:
    """The rows of `source` as both sides read them, and how many prompts were too long."""
    rows = read_rows(source)
    prompts, long = read_prompts(rows, tokenizer, args.max_prompt_length)
    advised = [
        {**row, "prompt": with_advice(row, number, args.teacher_prompt_template)}
        for number, row in enumerate(rows)
    ]
    seen = {p.row: p.ids for p in read_prompts(advised, tokenizer, None)[0]}
    return [Advised(**vars(p), teacher=seen[p.row]) for p in prompts], long


def with_advice(row: Mapping[str, Any], number: int, template: str) -> Any:
    """The row's prompt with its privileged context, in the template's words."""
    advice = row.get("privileged_context")
    if isinstance(advice, Sequence) and not isinstance(advice, str):
        advice = "\n".join(str(m["content"]) for m in advice)
    if not isinstance(advice, str) or not advice:
        raise DataError(
            f"row {number} has no `privileged_context` (a text or messages); its columns are "
            f"{sorted(row)}"
        )
    given = row.get("prompt")
    if isinstance(given, str) or not given:
        return template.format(prompt=given, privileged_context=advice) if given else given
    last = dict(given[-1])
    last["content"] = template.format(prompt=last["content"], privileged_context=advice)
    return [*given[:-1], last]


def describe_advised(
    prompts: Sequence[Advised], long: int, args: Any, tokenizer: Tokenizer
) -> list[str]:
    """`describe_prompts`, and what the teacher reads in place of the first one."""
    lines = describe_prompts(prompts, long, args, tokenizer)
    taught = tokenizer.decode(prompts[0].teacher.tolist())
    return [*lines, f"  teacher: {quoted(taught).lstrip()}"]


class SelfDistillationTrainer(Trainer):
    """The trainer with the self-distillation objective."""

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: SelfDistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, SelfDistillationConfig, optimizer, more)
        model, tokenizer = load_pair(model, processing_class, args)
        if train_dataset is None:
            raise ConfigError("the trainer needs train_dataset: `prompt`, `privileged_context`")
        if not callable(getattr(model, "backbone", None)):
            raise ConfigError("model: load it with topwork.AutoModelForCausalLM")
        train, long = read_advised(train_dataset, tokenizer, args)
        evals: dict[str, Sequence[Any]] = {
            name: read_advised(rows, tokenizer, args)[0]
            for name, rows in named_sets(eval_dataset).items()
        }
        policy = adapted(model, peft_config, added_ids(tokenizer, args))
        follows = args.teacher == "ema"
        if args.teacher == "self":
            teacher = Reference(policy)
        else:
            teacher = choose_reference(policy, None, peft_config is not None, follows, False)
        follow = FollowPolicy(teacher, args.ref_model_sync_steps, args.ref_model_mixup_alpha)
        super().__init__(
            policy,
            args,
            SelfDistillation(
                args, EngineWriter(sampling_options(args, tokenizer)), teacher, policy
            ),
            train,
            evals,
            tokenizer=tokenizer,
            callbacks=[*callbacks, follow] if follows else callbacks,
            optimizer=optimizer,
            data_fingerprint=prompts_fingerprint(train),
            notes=describe_advised(train, long, args, tokenizer),
        )
        if teacher.model is not None and teacher.model is not policy:
            teacher.model.to(self.device)


__all__ = ["SelfDistillation", "SelfDistillationConfig", "SelfDistillationTrainer"]
