"""Preferences between the policy's own answers, judged as they are drawn: online DPO, XPO, Nash-MD.

The judge is what GRPO's is: reward functions and reward models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.generation import GenerationConfig, draw
from topwork.media import ImageTextProcessor
from topwork.objectives import formulas
from topwork.objectives.answers import halves, means, pair_metrics
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
from topwork.objectives.reference import Reference
from topwork.objectives.rewards import RewardFunc
from topwork.objectives.rollouts import (
    Answer,
    EngineWriter,
    Prompt,
    SeeingWriter,
    roll_out,
    seeds,
)
from topwork.objectives.routing import routed
from topwork.objectives.setup import at_least, one_of
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings

LOSSES = ("sigmoid", "ipo")


@settings
class OnlineDPOConfig(DrawsConfig):
    """A run of online DPO (arXiv:2402.04792)."""

    num_generations: int = 2
    """Answers to each prompt; the best and the worst of them make the pair."""
    beta: float = 0.1
    loss_type: str = "sigmoid"
    importance_correction: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, LOSSES)
        at_least("beta", self.beta, 0, above=True)
        at_least("num_generations", self.num_generations, 2)
        no_correction(self, "pairs are compared")


@settings
class XPOConfig(OnlineDPOConfig):
    """A run of exploratory preference optimisation (arXiv:2405.21046)."""

    alpha: float = 1e-5
    """Weight of log π of the reference's answers, which draws the policy away from them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("alpha", self.alpha, 0)
        _pairs_only(self)


@settings
class NashMDConfig(DrawsConfig):
    """A run of Nash mirror descent (arXiv:2312.00886)."""

    num_generations: int = 2
    beta: float = 0.1
    """Weight of the divergence from the reference."""
    mixture_coef: float = 0.5
    """The reference's share in the opponent, the geometric mixture of both."""
    importance_correction: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("beta", self.beta, 0)
        _pairs_only(self)
        if not 0 <= self.mixture_coef <= 1:
            raise ConfigError(f"mixture_coef={self.mixture_coef} must be in [0, 1]")
        if self.importance_correction != "none" or self.repetition_penalty != 1:
            raise ConfigError("Nash-MD goes with neither importance_correction nor a penalty")


def no_correction(args: DrawsConfig, why: str) -> None:
    """ConfigError for a correction by π/μ, which the loss has no place for."""
    if args.importance_correction != "none":
        raise ConfigError(f"importance_correction has no meaning here: {why}")


def _pairs_only(args: DrawsConfig) -> None:
    if args.num_generations != 2:
        raise ConfigError(
            f"num_generations={args.num_generations} must be 2: an answer and its opponent's"
        )


@dataclass
class Judged(Rollout):
    """Pairs, the better answer first: `advantages` [P] is 0 where none is better, else 1; `ref` [A]
    of whole answers; `explored` [A] is 1 where the reference wrote it."""

    explored: Tensor | None = None


@dataclass
class OnlineDPO(OverDraws):
    """The objective. The units are pairs; answers that earn the same teach nothing."""

    kind: type[Any] = Judged
    reference: Reference | None = None

    def weight(self, batch: Judged) -> float:
        return batch.answers / 2

    def collected(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None
    ) -> list[Judged]:
        """Draw and judge a whole step, and pair the best answer with the worst."""
        prompts = [p for group in groups for p in group]
        drawn = self._drawn(model, prompts, None if world is None else self.number)
        self.draw.keep(drawn[0], self.draw.jury.summed(drawn[0].rewards))
        return [self._pairs(model, part) for part in split(groups, drawn)]

    def _drawn(self, model: nn.Module, prompts: list[Prompt], number: int | None) -> list[Drawn]:
        return self.draw(model, prompts, number)

    def _pairs(self, model: nn.Module, drawn: Sequence[Drawn]) -> Judged:
        pairs, judged, explored = [], [], []
        for one in drawn:
            scores = self.draw.jury.summed(one.rewards)
            best = int(scores.argmax())
            worst = int(scores.argmin())
            if float(scores[best]) == float(scores[worst]):
                best, worst = 0, 1
            order = [best, worst]
            answers = [one.answers[i] for i in order]
            pairs.append(Drawn(one.prompt, answers, one.rewards[order], one.staleness))
            judged.append(float(scores[best] > scores[worst]))
            explored += [float(i == 1) for i in order]
        device = next(model.parameters()).device
        batch, _ = collate_answers(pairs, device, placer=self.draw.placer)
        found = Judged(batch, torch.tensor(judged, device=device))
        found.explored = torch.tensor(explored, device=device)
        assert self.reference is not None
        with self.reference.of(model) as reference:
            found.ref = self._answers(reference, found)
        found.metrics = {**self.draw.metrics(drawn), **means({"ties": 1 - found.advantages})}
        return found

    def _answers(self, model: nn.Module, batch: Judged) -> Tensor:
        """log π of each answer [A]."""
        return batch.spread.sums(token_logprobs(model, batch.batch, self.args.temperature))

    def remember(self, model: nn.Module, batch: Judged) -> None:
        """The loss compares with the reference alone."""

    def sketch(self, model: nn.Module, sample: Prompt) -> Judged:
        """A batch of the usual shape without drawing, to plan the memory."""
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        rewards = torch.zeros(2, len(self.draw.jury.names))
        return self._pairs(model, [Drawn(sample, [Answer(ids, True)] * 2, rewards)])

    def loss(self, model: nn.Module, batch: Judged) -> Loss:
        with routed(model, batch.batch, self.args.router_aux_loss_coef) as routers:
            sums = self._answers(model, batch)
        assert batch.ref is not None
        one = torch.ones_like(batch.advantages)  # IPO here is of whole answers
        pairs = formulas.Pairs(*halves(sums), *halves(batch.ref), one, one)
        losses = formulas.PAIRWISE[self.args.loss_type](pairs, formulas.Dials(self.args.beta))
        total = (losses * batch.advantages).sum() + self._more(sums, batch)
        told = pair_metrics(self.args.beta * pairs.c, self.args.beta * pairs.r)
        told |= means({"logps/chosen": pairs.chosen, "logps/rejected": pairs.rejected,
                       "kl": sums - batch.ref})  # fmt: skip
        return routers.beside(Loss(total, {**batch.metrics, **told}), self.weight(batch))

    def _more(self, sums: Tensor, batch: Judged) -> Tensor:
        return sums.new_zeros(())


@dataclass
class XPO(OnlineDPO):
    """One answer of a pair is the policy's, the other one the reference's."""

    def _drawn(self, model: nn.Module, prompts: list[Prompt], number: int | None) -> list[Drawn]:
        staleness, own = self.draw.answers(model, prompts, number)
        assert self.reference is not None
        limit = self.args.max_completion_length
        other = write_as(self.reference, model, self.draw.writer, prompts, 1, limit)
        pairs = [[*a, *b] for a, b in zip(own, other)]
        return self.draw.judged(prompts, pairs, staleness)

    def _more(self, sums: Tensor, batch: Judged) -> Tensor:
        assert batch.explored is not None
        return self.args.alpha * (sums * batch.explored).sum()


@dataclass
class NashMD(OverDraws):
    """The policy's answer against one of its mixture with the reference. The units are answers."""

    reference: Reference | None = None

    def weight(self, batch: Rollout) -> float:
        return batch.answers

    def collected(
        self, model: nn.Module, groups: Sequence[Sequence[Prompt]], world: World | None
    ) -> list[Rollout]:
        """Draw both answers to each prompt; what is trained of them is the policy's."""
        prompts = [p for group in groups for p in group]
        staleness, own = self.draw.answers(model, prompts, None if world is None else self.number)
        assert self.reference is not None
        other = write_mixed(model, self.reference, prompts, self.args, self.draw.tokenizer)
        drawn = self.draw.judged(prompts, [[*a, b] for a, b in zip(own, other)], staleness)
        self.draw.keep(drawn[0], self.draw.jury.summed(drawn[0].rewards))
        return [self._rollout(model, part) for part in split(groups, drawn)]

    def _rollout(self, model: nn.Module, drawn: Sequence[Drawn]) -> Rollout:
        scores = torch.stack([self.draw.jury.summed(d.rewards) for d in drawn])  # [P, 2]
        wins = torch.sigmoid(scores[:, 0] - scores[:, 1])
        device = next(model.parameters()).device
        own = [Drawn(d.prompt, d.answers[:1], d.rewards[:1]) for d in drawn]
        batch, _ = collate_answers(own, device)
        found = Rollout(batch, (wins - 0.5).to(device))
        assert self.reference is not None
        with self.reference.of(model) as reference:
            found.ref = token_logprobs(reference, batch, self.args.temperature)
        found.metrics = {**self.draw.metrics(drawn), **means({"win_rate": wins})}
        return found

    def remember(self, model: nn.Module, batch: Rollout) -> None:
        """The loss has no ratio to an earlier policy."""

    def sketch(self, model: nn.Module, sample: Prompt) -> Rollout:
        """A batch of the usual shape without drawing, to plan the memory."""
        ids = [int(sample.ids[-1])] * min(16, self.args.max_completion_length)
        rewards = torch.zeros(2, len(self.draw.jury.names))
        return self._rollout(model, [Drawn(sample, [Answer(ids, True)] * 2, rewards)])

    def loss(self, model: nn.Module, batch: Rollout) -> Loss:
        """β·KL(π ‖ π_ref) less the chance to win, both by REINFORCE, with a half as baseline."""
        with routed(model, batch.batch, self.args.router_aux_loss_coef) as routers:
            new = token_logprobs(model, batch.batch, self.args.temperature)
        assert batch.ref is not None
        apart = new.detach() - batch.ref
        gains = batch.advantages * batch.spread.sums(new)
        total = self.args.beta * (apart * new).sum() - gains.sum()
        found = Loss(total, {**batch.metrics, **means({"kl": batch.spread.sums(apart)})})
        return routers.beside(found, self.weight(batch))


def write_as(
    reference: Reference, policy: nn.Module, writer: Any, prompts: Sequence[Prompt],
    count: int, limit: int, generator: torch.Generator | None = None,
) -> list[list[Answer]]:  # fmt: skip
    """`count` answers of the reference to each prompt."""
    bare = reference.model is None and reference.adapter is None
    if bare and not isinstance(writer, SeeingWriter):  # whose adapter is the model's own
        writer = EngineWriter({**writer.options, "adapter": None})
    with reference.of(policy) as model:
        return roll_out(writer, model, prompts, count, limit, generator)


@torch.no_grad()
def write_mixed(
    policy: Any, reference: Reference, prompts: Sequence[Prompt], args: Any, tokenizer: Tokenizer
) -> list[Answer]:
    """An answer to each prompt, each token drawn from π^(1-α) · π_ref^α, α `mixture_coef`."""
    count, longest = len(prompts), max(len(p) for p in prompts)
    device = next(policy.parameters()).device
    ids = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.ids).long()
        mask[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        min_p=args.min_p,
    )  # fmt: skip
    generators = [torch.Generator().manual_seed(seed) for seed in seeds(count)]
    caches = [policy.new_cache(), None]
    texts: list[list[int]] = [[] for _ in prompts]
    ended = [False] * count
    was_training = policy.training
    policy.eval()
    given = ids.to(device)
    for _ in range(args.max_completion_length):
        own = _next_logprobs(policy, given, mask.to(device), caches[0])
        with reference.of(policy) as other:
            caches[1] = caches[1] or other.new_cache()  # type: ignore[operator]
            theirs = _next_logprobs(other, given, mask.to(device), caches[1])
        scores = (1 - args.mixture_coef) * own + args.mixture_coef * theirs
        tokens = draw.draw(scores.cpu(), [config] * count, generators).ids
        for row, token in enumerate(tokens.tolist()):
            if not ended[row]:
                texts[row].append(token)
                ended[row] = token == tokenizer.eos_token_id
        if all(ended):
            break
        given = tokens[:, None].to(device)
        mask = torch.cat((mask, mask.new_ones(count, 1)), 1)
    policy.train(was_training)
    return [Answer(text, end) for text, end in zip(texts, ended)]


def _next_logprobs(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    hidden = model.backbone(ids, attention_mask=mask, cache=cache)
    return model.head(hidden[:, -1]).float().log_softmax(-1)


class OnlineDPOTrainer(Trainer):
    """The trainer with the online DPO objective; rows and `reward_funcs` as in `GRPOTrainer`,
    `ref_model` as in `DPOTrainer`."""

    objective_class: ClassVar[type[OverDraws]] = OnlineDPO
    config_class: ClassVar[type[DrawsConfig]] = OnlineDPOConfig
    drawn: ClassVar[int | None] = None
    """Answers that the policy itself writes to each prompt; None: all."""
    sees: ClassVar[bool] = True
    """Prompts may have images."""

    def __init__(
        self,
        model: nn.Module | str | Path,
        ref_model: nn.Module | str | Path | None = None,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] = (),
        args: DrawsConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        reward_processing_classes: Any = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        environment_factory: Any = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, self.config_class, optimizer, more)
        if self.drawn and (args.rollout_server or tools or environment_factory):
            raise ConfigError(
                "both answers are written in this process and in one turn: leave rollout_server, "
                "tools and environment_factory out"
            )
        found = set_up(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class,
            reward_processing_classes, peft_config, 1.0, tools, environment_factory, ref_model,
            self.sees,
        )  # fmt: skip
        if self.drawn:
            found.draw.count = self.drawn
        objective: Any = self.objective_class(args, found.draw)
        objective.reference = found.reference
        super().__init__(
            found.policy, args, objective, callbacks=callbacks, optimizer=optimizer, **found.given()
        )
        found.attach(self)


class XPOTrainer(OnlineDPOTrainer):
    """The trainer with the XPO objective; arguments as OnlineDPOTrainer's."""

    objective_class: ClassVar[type[OverDraws]] = XPO
    config_class: ClassVar[type[DrawsConfig]] = XPOConfig
    drawn: ClassVar[int | None] = 1


class NashMDTrainer(OnlineDPOTrainer):
    """The trainer with the Nash-MD objective; arguments as OnlineDPOTrainer's."""

    objective_class: ClassVar[type[OverDraws]] = NashMD
    config_class: ClassVar[type[DrawsConfig]] = NashMDConfig
    sees: ClassVar[bool] = False
    drawn: ClassVar[int | None] = 1


__all__ = [
    "NashMD",
    "NashMDConfig",
    "NashMDTrainer",
    "OnlineDPO",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "XPO",
    "XPOConfig",
    "XPOTrainer",
]
