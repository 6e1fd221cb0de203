"""Self-distilled policy optimisation (SDPO, arXiv:2601.20802): those of a group's answers that
earned enough show the others how. The teacher is the policy itself, whose prompt holds such an
answer (or what was said of a failure), and it judges every token of what was drawn without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch
from topwork.errors import ConfigError, DataError
from topwork.media import ImageTextProcessor
from topwork.objectives import kept
from topwork.objectives.answers import means
from topwork.objectives.distill import head_of, seen_at
from topwork.objectives.draws import Drawn, Rollout, collate_answers
from topwork.objectives.familiar import Familiar, idle, refused
from topwork.objectives.grpo import GRPO, GRPOConfig, GRPOTrainer, corrected
from topwork.objectives.logprobs import Scored, score, token_logprobs
from topwork.objectives.reference import FollowPolicy, Reference, choose_reference
from topwork.objectives.rewards import RewardFunc
from topwork.objectives.rollouts import Answer, Prompt, read_prompts
from topwork.objectives.routing import routed
from topwork.objectives.selfdistill import TEACHERS
from topwork.objectives.setup import at_least, one_of
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Loss, TrainerCallback
from topwork.training.familiar import settings

MODES = ("sampled_token", "full_logits", "topk_logits")
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
TEMPLATES = {
    "reprompt_template": ("prompt", "solution", "feedback"),
    "solution_template": ("successful_previous_attempt",),
    "feedback_template": ("feedback_raw",),
}


@settings
class SDPOConfig(GRPOConfig):
    """A run of self-distilled policy optimisation."""

    distillation_weight: float = 1.0
    """Share of the distillation in the loss; the rest is GRPO's."""
    distillation_mode: str = "sampled_token"
    """What is compared at each token: the teacher's and the policy's chance of the token that was
    drawn ("sampled_token"), all their chances ("full_logits"), or those of the policy's likeliest
    tokens ("topk_logits")."""
    distillation_alpha: float = 1.0
    """0: KL(teacher ‖ policy); 1: KL(policy ‖ teacher); between: Jensen-Shannon."""
    distillation_topk: int | None = None
    distillation_add_tail: bool = False
    """All tokens but the likeliest count as one more; else not at all."""
    distillation_is_clip: float | None = 2.0
    """Cap of π/π_old, by which tokens are weighed after the first step on a draw; None: not."""
    teacher: str = "ema"
    """The weights that teach: those of the "start", the policy's of the moment ("self"), or such
    that follow them ("ema")."""
    ref_model_mixup_alpha: float = 0.05
    """The policy's share in each mixture, with "ema"."""
    ref_model_sync_steps: int = 1
    use_successful_as_teacher: bool = True
    success_reward_threshold: float = 1.0
    """What an answer has to earn to be shown."""
    dont_reprompt_on_self_success: bool = True
    """An answer is never its own example."""
    include_environment_feedback: bool = False
    """The teacher reads the row's `privileged_context` too, a text."""
    environment_feedback_only_without_solution: bool = False
    remove_thinking_from_demonstration: bool = False
    """Leave <think>…</think> out of the answer that is shown."""
    max_reprompt_len: int | None = 10240
    """An answer whose teacher would read a longer prompt is not distilled."""
    reprompt_template: str = "{prompt}{solution}{feedback}\n\nAnswer the question above."
    """The teacher's (last) message."""
    solution_template: str = "\n\nThis answer was right:\n{successful_previous_attempt}"
    feedback_template: str = "\n\nThis was said of a failed attempt:\n{feedback_raw}"

    familiar: ClassVar[dict[str, Familiar]] = idle(
        "the log says how many answers had a teacher",
        diagnostics_warning_interval=10,
        diagnostics_flat_tolerance=1e-8,
    ) | refused(
        teacher_model_kind=("ema", 'it is called teacher: "start" for base, "self" for live'),
        teacher_update_rate=(0.05, "it is called ref_model_mixup_alpha"),
        teacher_sync_steps=(1, "it is called ref_model_sync_steps"),
        use_teacher_server=(False, "the teacher has the policy's weights and is in this process"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("distillation_mode", self.distillation_mode, MODES)
        one_of("teacher", self.teacher, TEACHERS)
        for name in ("distillation_weight", "distillation_alpha", "ref_model_mixup_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be in [0, 1]")
        at_least("distillation_is_clip", self.distillation_is_clip, 0, above=True)
        at_least("distillation_topk", self.distillation_topk, 1)
        at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1)
        _check_modes(self)

    def among(self) -> ops.Likeliest | None:
        """The tokens that the divergence is of."""
        if self.distillation_topk is None:
            return None
        return ops.Likeliest(self.distillation_topk, self.distillation_add_tail)


def _check_modes(args: SDPOConfig) -> None:
    """ConfigError for settings that do not go together."""
    if args.distillation_mode == "sampled_token" and args.distillation_alpha != 1:
        raise ConfigError(
            f"distillation_alpha={args.distillation_alpha}: of the drawn token alone only "
            "KL(policy ‖ teacher) is known; leave it at 1, or take full_logits"
        )
    if (args.distillation_mode == "topk_logits") != (args.distillation_topk is not None):
        raise ConfigError(
            f"distillation_topk={args.distillation_topk} goes with distillation_mode='topk_logits'"
        )
    if args.distillation_add_tail and args.distillation_topk is None:
        raise ConfigError("distillation_add_tail goes with distillation_mode='topk_logits'")
    if args.entropy_coef:
        raise ConfigError(f"entropy_coef={args.entropy_coef} is not read by SDPO")
    if args.beta:
        raise ConfigError(f"beta={args.beta}: there is no reference beside the teacher; leave it 0")
    if not (args.use_successful_as_teacher or args.include_environment_feedback):
        raise ConfigError(
            "the teacher would know nothing more: set use_successful_as_teacher or "
            "include_environment_feedback"
        )
    for template, wanted in TEMPLATES.items():
        for name in wanted:
            if f"{{{name}}}" not in getattr(args, template):
                raise ConfigError(f"{template} lacks {{{name}}}")


@dataclass
class Taught(Rollout):
    """`taught` [A]: which answers have a teacher; `teacher`: those behind the teacher's prompts."""

    taught: Tensor | None = None
    teacher: Batch | None = None


@dataclass
class SDPO(GRPO):
    """The objective. The units of the distillation are answers, those without a teacher too."""

    kind: type[Any] = Taught
    teacher: Reference = field(default_factory=Reference)
    policy: nn.Module | None = None

    def state(self) -> dict[str, Tensor]:
        held = {} if self.policy is None else self.teacher.state(self.policy)
        return {**super().state(), **held}

    def load_state(self, found: dict[str, Tensor]) -> None:
        if self.policy is not None:
            for name, tensor in self.teacher.state(self.policy).items():
                tensor.copy_(found[name])
        if kept.FACTS in found:
            super().load_state(found)

    # -- what the teacher reads ------------------------------------------------------------------

    def _rollout(self, model: nn.Module, drawn: Sequence[Drawn], advantages: Tensor) -> Rollout:
        scores = [self.draw.jury.summed(one.rewards).tolist() for one in drawn]
        return self._taught(super()._rollout(model, drawn, advantages), drawn, scores)

    def sketch(self, model: nn.Module, sample: Prompt) -> Rollout:
        """A batch of the usual shape without drawing, to plan the memory."""
        count = self.args.num_generations
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        drawn = Drawn(sample, [Answer(ids, True)] * count, torch.zeros(count, 1))
        plain = super()._rollout(model, [drawn], torch.zeros(1, count))
        return self._taught(plain, [drawn], [[self.args.success_reward_threshold] * count])

    def _taught(
        self, plain: Rollout, drawn: Sequence[Drawn], scores: Sequence[Sequence[float]]
    ) -> Taught:
        """The rollout with a teacher for every answer that there is something to say to."""
        places = [(one, k) for one in drawn for k in range(len(one.answers))]
        said = [self._retold(one, own, k) for one, own in zip(drawn, scores)
                for k in range(len(one.answers))]  # fmt: skip
        rows = [
            {**one.prompt.columns, "prompt": given}
            for (one, _), given in zip(places, said)
            if given is not None
        ]
        limit = self.args.max_reprompt_len
        placer = self.draw.placer
        read = iter(read_prompts(rows, self.draw.tokenizer, None, None, placer)[0] if rows else ())
        taught: list[bool] = []
        groups: list[Drawn] = []
        for (one, k), given in zip(places, said):
            prompt = None if given is None else replace(next(read), row=one.prompt.row)
            taught.append(prompt is not None and (limit is None or len(prompt) <= limit))
            if prompt is None or not taught[-1]:
                continue
            if groups and _same(groups[-1].prompt, prompt):
                groups[-1].answers.append(one.answers[k])
            else:
                groups.append(Drawn(prompt, [one.answers[k]], one.rewards))
        device, ended_only = plain.advantages.device, self.args.mask_truncated_completions
        teacher = collate_answers(groups, device, ended_only, placer)[0] if groups else None
        return Taught(**vars(plain), taught=torch.tensor(taught, device=device), teacher=teacher)

    def _retold(self, one: Drawn, scores: Sequence[float], k: int) -> Any:
        """The prompt of the teacher of answer `k`; None if there is nothing to tell it."""
        args, solution, feedback = self.args, "", ""
        shown = [
            j for j, score in enumerate(scores)
            if score >= args.success_reward_threshold
            and (j != k or not args.dont_reprompt_on_self_success)
        ]  # fmt: skip
        if shown and args.use_successful_as_teacher:
            text = self.draw.tokenizer.decode(one.answers[shown[0]].ids, skip_special_tokens=True)
            if args.remove_thinking_from_demonstration:
                text = THOUGHT.sub("", text).strip()
            solution = args.solution_template.format(successful_previous_attempt=text)
        alone = args.environment_feedback_only_without_solution
        if args.include_environment_feedback and not (alone and solution):
            given = one.prompt.columns.get("privileged_context")
            if isinstance(given, str) and given.strip():
                feedback = args.feedback_template.format(feedback_raw=given)
        if not solution and not feedback:
            return None
        return retold(one.prompt, args.reprompt_template, solution, feedback)

    # -- the loss --------------------------------------------------------------------------------

    def weight(self, batch: Rollout) -> Any:
        own = float(batch.answers)
        share = self.args.distillation_weight
        if share in (0, 1):
            return own if share else super().weight(batch)
        return super().weight(batch), own

    def loss(self, model: nn.Module, batch: Rollout) -> Loss:
        assert isinstance(batch, Taught)
        share = self.args.distillation_weight
        if share == 0:
            return super().loss(model, batch)
        with routed(model, batch.batch, self.args.router_aux_loss_coef) as routers:
            scored = score(model, batch.batch, temperature=self.args.temperature)
        apart, told = self._apart(model, scored, batch)
        total = batch.spread.means(apart).sum()
        if share == 1:
            return routers.beside(Loss(total, {**batch.metrics, **told}), float(batch.answers))
        rest = self.compared(batch, scored.logprobs)
        terms = torch.stack([(1 - share) * rest.total, share * total])
        found = Loss(terms, {**rest.metrics, **told})
        return routers.beside(found, self.weight(batch)[0])

    def _apart(
        self, model: nn.Module, scored: Scored, batch: Taught
    ) -> tuple[Tensor, dict[str, tuple[float, float]]]:
        """How far the policy is from its teacher at each token [N], 0 where it has none."""
        args, new = self.args, scored.logprobs
        assert batch.taught is not None
        told = means({"distillation/taught_fraction": batch.taught.float()})
        if batch.teacher is None:
            return new * 0.0, told
        own = batch.taught[batch.batch.owners]
        if args.distillation_mode == "sampled_token":
            with self.teacher.of(model) as teacher:
                wanted = token_logprobs(teacher, batch.teacher, args.temperature)
            gap = new[own] - wanted
            apart = gap.detach() * new[own]
        else:
            with self.teacher.of(model) as teacher:
                wanted, head = seen_at(teacher, batch.teacher), head_of(teacher)
            gap = apart = ops.token_divergence(
                head_of(model), scored.seen[own], head, wanted, args.distillation_alpha,
                args.temperature, args.among(),
            )  # fmt: skip
        told |= means({"distillation/divergence": gap})
        found = torch.zeros_like(new).masked_scatter(own, apart)
        return found * self._weights(batch, new), told

    def _weights(self, batch: Taught, new: Tensor) -> Tensor:
        """What each token counts [N], for the policy that drew it is not the present one."""
        found, cap = torch.ones_like(new), self.args.distillation_is_clip
        old = new.detach() if batch.old is None else batch.old
        correction, _ = corrected(self.args, batch, old)
        if correction is not None:
            found = found * correction
        if batch.old is not None and cap is not None:
            found = found * (new - batch.old).detach().clamp(-20, 20).exp().clamp(max=cap)
        return found


def _same(one: Prompt, other: Prompt) -> bool:
    """Whether two teachers read the same, so that it is computed once."""
    return one.row == other.row and np.array_equal(one.ids, other.ids)


def retold(prompt: Prompt, template: str, solution: str, feedback: str) -> Any:
    """The prompt in the template's words, a text or messages as it was; images of the last message
    come before its words. DataError where that one is not the user's."""
    if isinstance(prompt.given, str):
        return template.format(prompt=prompt.given, solution=solution, feedback=feedback)
    last = dict(prompt.given[-1])
    if last.get("role") != "user":
        raise DataError(
            f"row {prompt.row}: the teacher's prompt goes on from the user's last message, but "
            f"there is one of {last.get('role')!r}"
        )
    parts = last["content"]
    plain = isinstance(parts, str)
    text = parts if plain else "".join(p["text"] for p in parts if p["type"] == "text")
    text = template.format(prompt=text, solution=solution, feedback=feedback)
    seen = [] if plain else [p for p in parts if p["type"] != "text"]
    last["content"] = text if plain else [*seen, {"type": "text", "text": text}]
    return [*prompt.given[:-1], last]


class SDPOTrainer(GRPOTrainer):
    """The trainer with the SDPO objective; rows and `reward_funcs` as in `GRPOTrainer`. A row may
    have `privileged_context`, see `include_environment_feedback`."""

    objective_class: ClassVar[type[GRPO]] = SDPO
    config_class: ClassVar[type[GRPOConfig]] = SDPOConfig

    def __init__(
        self,
        model: nn.Module | str | Path,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] = (),
        args: SDPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        peft_config: PeftConfig | None = None,
        **more: Any,
    ) -> None:
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class,
            reward_processing_classes, callbacks, optimizer, peft_config, **more,
        )  # fmt: skip
        given: Any = self.args
        objective: Any = self.objective
        if given.distillation_mode != "sampled_token" and not hasattr(self.model, "backbone"):
            raise ConfigError("model: load it with topwork.AutoModelForCausalLM")
        follows = given.teacher == "ema"
        if given.teacher == "self":
            teacher = Reference(self.model)
        else:
            fresh = peft_config is not None
            teacher = choose_reference(self.model, None, fresh, follows, False)
        objective.teacher, objective.policy = teacher, self.model
        if follows:
            share = given.ref_model_mixup_alpha
            self.callbacks.append(FollowPolicy(teacher, given.ref_model_sync_steps, share))


__all__ = ["SDPO", "SDPOConfig", "SDPOTrainer"]
