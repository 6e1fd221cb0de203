"""Distillation across tokenizers that share tokens, on the student's own answers too (GOLD, Patiño
et al. 2025): what is in both vocabularies is compared token by token, the rest sorted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.prepare import Sample
from topwork.errors import ConfigError
from topwork.objectives.familiar import WRITES, Familiar, idle, refused
from topwork.objectives.gkd import check_cuts, prompt_of
from topwork.objectives.reference import Reference
from topwork.objectives.rollouts import EngineWriter, seeds
from topwork.objectives.setup import at_least
from topwork.objectives.uld import ULD, Parallel, Twice, ULDConfig, ULDTrainer, paired
from topwork.text import Tokenizer
from topwork.training.distributed import World
from topwork.training.familiar import settings

TORN = "\ufffd"  # what stands for bytes that are no whole character


@settings
class GOLDConfig(ULDConfig):
    """A run of distillation from a teacher whose tokenizer shares tokens with the student's."""

    lmbda: float = 0.5
    """Share of the rows that the student answers itself."""
    max_new_tokens: int = 128
    top_p: float = 1.0
    """Answers are drawn from the likeliest tokens that make up so much of the chances."""
    top_k: int = 0
    """Answers are drawn from so many of the likeliest tokens; 0: from all."""
    beta: float = 0.5
    """Divergence of shared tokens. 0: KL(teacher ‖ student); 1: KL(student ‖ teacher); between:
    Jensen-Shannon."""
    uld_hybrid_matched_weight: float | None = None
    """Weight of the shared tokens' divergence; None: their share of the teacher's vocabulary."""
    uld_hybrid_unmatched_weight: float | None = None
    """Weight of the other tokens' sorted distance; None: the rest."""

    familiar: ClassVar[dict[str, Familiar]] = {
        **WRITES,
        **idle("a row's end is learnt too", uld_skip_student_eos=False, uld_skip_teacher_eos=False),
        "use_uld_loss": Familiar(True, "with one tokenizer take GKDTrainer"),
        "use_extended_uld": Familiar(True, "stretches of text are compared, not places"),
        "uld_use_hybrid_loss": Familiar(True, "without shared tokens it is ULDTrainer"),
        **refused(
            uld_token_merge_strategy=("bayesian", "other ways read the wrong place's distribution"),
            uld_crossentropy_weight=(0.0, "it is called sft_weight"),
            uld_distillation_weight=(1.0, "weigh the rest by sft_weight"),
            uld_student_temperature=(1.0, "it is called temperature"),
            uld_teacher_temperature=(1.0, "it is called teacher_temperature"),
            seq_kd=(False, "have the teacher answer the rows before the run"),
            teacher_tokenizer_name_or_path=(None, "pass it as teacher_processing_class"),
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lmbda", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be in [0, 1]")
        at_least("max_new_tokens", self.max_new_tokens, 1)
        check_cuts(self)
        weights = (self.uld_hybrid_matched_weight, self.uld_hybrid_unmatched_weight)
        if (weights[0] is None) != (weights[1] is None):
            raise ConfigError("set both uld_hybrid_matched_weight and uld_hybrid_unmatched_weight")
        for weight in weights:
            at_least("uld_hybrid_…_weight", weight, 0)


# -- tokens that both vocabularies have ------------------------------------------------------------


def shared_tokens(student: Tokenizer, teacher: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of the tokens that say the same in both vocabularies, the end tokens among them."""
    ours, theirs = _said(student), _said(teacher)
    found = {ours[text]: theirs[text] for text in ours if text in theirs}
    ends = student.eos_token_id, teacher.eos_token_id
    if None not in ends and ends[0] not in found and ends[1] not in found.values():
        found[ends[0]] = ends[1]
    return list(found), list(found.values())


def _said(tokenizer: Tokenizer) -> dict[str, int]:
    """What each token says within a text → its id, the first one if there are several.

    A token of bytes that are no whole character is known by its spelling alone.
    """
    found: dict[str, int] = {}
    for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        text = tokenizer.convert_tokens_to_string(["a", piece]).removeprefix("a")
        found.setdefault(f"{TORN}{piece}" if TORN in text or not text else text, number)
    return found


@dataclass(frozen=True)
class GOLD(ULD):
    """The objective; `same`: the ids of shared tokens in both vocabularies. `draws`: its batches
    are drawn, so a run stops between steps only."""

    same: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(0), torch.zeros(0)))
    beta: float = 0.5
    weights: tuple[float, float] = (0.5, 0.5)
    lmbda: float = 0.0
    new: int = 128
    writer: EngineWriter | None = None
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None
    draws: bool = True

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Twice]], world: World | None = None
    ) -> list[Parallel]:
        """Who writes is tossed for each row; evaluation takes the rows as they are."""
        if world is not None and self.lmbda:
            samples = [s for group in groups for s in group]
            own = (torch.rand(len(samples)) < self.lmbda).tolist()
            written = iter(self._written(model, [s for s, toss in zip(samples, own) if toss]))
            found = iter([next(written) if toss else s for s, toss in zip(samples, own)])
            groups = [[next(found) for _ in group] for group in groups]
        return super().assemble(model, groups, world)

    def sketch(self, model: nn.Module, sample: Twice) -> Parallel:
        """A batch of the usual shape without drawing, to plan the memory."""
        (batch,) = super().assemble(model, [[sample]])
        return batch

    def _written(self, model: nn.Module, samples: Sequence[Twice]) -> list[Twice]:
        """The samples with the student's answers in place of their own, for both sides; as they
        were where the student said nothing that the teacher could read."""
        if not samples:
            return []
        assert self.writer is not None
        prompts = [prompt_of(s) for s in samples]
        texts = [p.tolist() for p in prompts]
        answers = self.writer.write(model, texts, [self.new] * len(texts), seeds(len(texts)))
        found = []
        for sample, prompt, answer in zip(samples, prompts, answers):
            pair = self._for_both(sample, prompt, answer.ids, answer.ended)
            found.append(sample if pair is None or not pair.mine else pair)
        return found

    def _for_both(
        self, sample: Twice, prompt: np.ndarray, ids: Sequence[int], ended: bool
    ) -> Twice | None:
        assert self.tokenizers is not None
        student, teacher = self.tokenizers
        text = student.decode(list(ids), skip_special_tokens=True)
        said = list(teacher(text, add_special_tokens=False)["input_ids"])
        if ended:
            said.append(_closing(sample.teacher, teacher))
        mine = _answered(sample.row, prompt, ids)
        theirs = _answered(sample.row, prompt_of(sample.teacher), said)
        return paired(mine, theirs, student, teacher)

    def _distance(self, sides: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        device = sides[1].device
        same = (self.same[0].to(device), self.same[1].to(device))
        shared, rest = ops.hybrid_distance(*sides, same=same, beta=self.beta).unbind(1)
        found = self.weights[0] * shared + self.weights[1] * rest
        return found, {"distance": found, "distance/shared": shared, "distance/sorted": rest}


def _answered(row: int, prompt: np.ndarray, ids: Sequence[int]) -> Sample:
    whole = np.concatenate([prompt, np.asarray(ids, np.int32)])
    return Sample(row, whole, np.arange(len(whole)) >= len(prompt))


def _closing(sample: Sample, tokenizer: Tokenizer) -> int:
    """The token that ends the row's answer."""
    last = int(sample.ids[np.flatnonzero(sample.trained)[-1]])
    return last if last in tokenizer.all_special_ids else int(tokenizer.eos_token_id)


class GOLDTrainer(ULDTrainer):
    """The trainer with the GOLD objective; arguments as ULDTrainer's."""

    config_class: ClassVar[type[ULDConfig]] = GOLDConfig

    def _objective(
        self, args: Any, teacher: Reference, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
    ) -> ULD:
        plain = super()._objective(args, teacher, tokenizer, teacher_tokenizer)
        same = shared_tokens(tokenizer, teacher_tokenizer)
        model: Any = teacher.model
        share = len(same[0]) / model.config.vocab_size
        weights = (args.uld_hybrid_matched_weight, args.uld_hybrid_unmatched_weight)
        options = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p,
                   "top_k": args.top_k,
                   "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
        return GOLD(
            **vars(plain), same=(torch.tensor(same[0]).long(), torch.tensor(same[1]).long()),
            beta=args.beta, weights=(share, 1 - share) if weights[0] is None else weights,
            lmbda=args.lmbda, new=args.max_new_tokens, writer=EngineWriter(options),
            tokenizers=(tokenizer, teacher_tokenizer),
        )  # fmt: skip


__all__ = ["GOLD", "GOLDConfig", "GOLDTrainer"]
