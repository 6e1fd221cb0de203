"""What the objectives over answers share: configuration, batches, sums per answer, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from topwork.data.answers import PreparedAnswers, Rated, prepare_answers, unpaired
from topwork.data.formats import Format
from topwork.data.groups import collate_groups
from topwork.data.packing import Batch
from topwork.data.prepare import Marking, Sample, describe_losses, marked_text
from topwork.data.rows import read_rows
from topwork.errors import ConfigError
from topwork.media.placed import Placer
from topwork.objectives.familiar import ANSWERS, Familiar
from topwork.objectives.language import LanguageConfig
from topwork.objectives.setup import end_token, named_sets
from topwork.objectives.sighted import described, reading
from topwork.text import Tokenizer
from topwork.training.familiar import settings

Metrics = dict[str, tuple[float, float]]


@settings
class AnswersConfig(LanguageConfig):
    """What runs over judged answers share. A sample of a batch is a row: a pair counts once."""

    familiar: ClassVar[dict[str, Familiar]] = ANSWERS

    learning_rate: float = 1e-6
    disable_dropout: bool = True
    max_length: int | None = 1024
    """Tokens of a prompt and an answer. Longer answers are cut, prompts that leave nothing of an
    answer drop their row; both are counted and told. None: no limit."""
    eos_token: str | None = None
    """Ends plain texts; None: the tokenizer's."""
    chat_template: str | None = None
    """Replaces the tokenizer's template."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length={self.max_length} must be at least 2")


@dataclass
class AnswerBatch:
    """A micro-batch of G samples with A answers: what is said of the samples (`values` [G], zeros
    where nothing is), and what the reference says of the answers (`reference` [A]), once known."""

    batch: Batch
    values: Tensor
    reference: Tensor | None = None

    @property
    def owners(self) -> Tensor:
        return self.batch.owners

    @property
    def answers(self) -> int:
        return sum(len(n) - 1 if isinstance(n, tuple) else 1 for n in self.batch.lengths)

    def sums(self, values: Tensor) -> Tensor:
        """`values` [N] of the targets, summed over each answer: [A]."""
        return values.new_zeros(self.answers).index_add(0, self.owners, values)

    def counts(self) -> Tensor:
        """The trained tokens of each answer [A]."""
        return torch.bincount(self.owners, minlength=self.answers).to(torch.float32)


def collect(
    model: nn.Module, samples: Sequence[Rated], placer: Placer | None = None
) -> AnswerBatch:
    """The micro-batch of these samples, on the model's device; `placer` reads their images.

    TrainingError for an image that cannot be read.
    """
    device = next(model.parameters()).device
    values = torch.tensor([0.0 if s.value is None else s.value for s in samples], device=device)
    known = [s.reference for s in samples]
    reference = None
    if all(r is not None for r in known):
        reference = torch.tensor([x for r in known for x in r or ()], device=device)
    with reading():
        batch = collate_groups(samples, placer)
    return AnswerBatch(batch.to(device), values, reference)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """[A] of answers, chosen and rejected in turn, as two [P]."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


@dataclass(frozen=True)
class OverAnswers:
    """The part of an objective that does not depend on its loss. `placer` reads the images of rows,
    for a model that takes some; `router` weighs the routers' loss, as in `routed`."""

    placer: Placer | None = field(default=None, kw_only=True)
    router: float | None = field(default=None, kw_only=True)

    def collect(self, model: nn.Module, samples: Sequence[Rated]) -> AnswerBatch:
        return collect(model, samples, self.placer)

    def size(self, sample: Rated) -> int:
        return len(sample)

    def tokens(self, batch: AnswerBatch) -> int:
        return batch.batch.tokens

    def rows(self, batch: AnswerBatch) -> Sequence[int]:
        return batch.batch.rows

    def prompt(self, sample: Rated) -> Sample:
        return prompt_of(sample)


def pair_metrics(chosen: Tensor, rejected: Tensor, prefix: str = "rewards/") -> Metrics:
    """Means over pairs of their rewards [P], margins, and how often the chosen one is higher."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return means(
        {
            f"{prefix}chosen": chosen,
            f"{prefix}rejected": rejected,
            f"{prefix}accuracies": (chosen > rejected).float(),
            f"{prefix}margins": chosen - rejected,
        }
    )


def means(values: Mapping[str, Tensor]) -> Metrics:
    """Each tensor as its sum and its size."""
    return {name: (float(v.detach().sum()), float(v.numel())) for name, v in values.items()}


# -- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The groups of a run: to train on, and to evaluate on by name."""

    train: PreparedAnswers
    evals: dict[str, PreparedAnswers]

    @property
    def eval_samples(self) -> dict[str, Sequence[Rated]]:
        return {name: prepared.samples for name, prepared in self.evals.items()}


def read_answers(
    train: Any, evals: Any, tokenizer: Tokenizer, args: Any, known: Sequence[Format],
    whole: bool = False, single: bool = False, placer: Placer | None = None,
) -> Data:  # fmt: skip
    """The rows of a run as groups; `whole` as in `prepare_answers`, `single`: each answer apart."""
    if train is None:
        raise ConfigError("the trainer needs train_dataset")
    marking = Marking(max_length=args.max_length, end_token=end_token(tokenizer, args.eos_token))

    def read(rows: Any) -> PreparedAnswers:
        prepared = prepare_answers(read_rows(rows), tokenizer, marking, known, whole, placer)
        return unpaired(prepared) if single else prepared

    return Data(read(train), {name: read(rows) for name, rows in named_sets(evals).items()})


def report(data: Data, tokenizer: Tokenizer, whole: bool = False) -> list[str]:
    """What the run trains on: format, counts, losses, and one row with its answers marked."""
    train = data.train
    saved = 1 - train.tokens / max(1, train.apart)
    trained = "" if whole else f", {train.supervised:,} of them trained"
    lines = [
        f"data: {train.format} format; {len({s.row for s in train.samples}):,} of {train.rows:,} "
        f"rows kept, {train.answers:,} answers, {train.apart:,} tokens{trained}",
        *described(train.samples),
        f"shared prompts are computed once: {train.tokens:,} tokens ({100 * saved:.0f} % fewer)",
        *describe_losses(train),
    ]
    for name, prepared in data.evals.items():
        named = f"evaluation{' ' + name if name else ''}"
        kept = len({s.row for s in prepared.samples})
        lines.append(f"{named}: {kept:,} of {prepared.rows:,} rows kept")
        lines += [f"{named}: {line}" for line in describe_losses(prepared)]
    if not whole and train.unterminated:
        ended = train.answers - train.unterminated
        lines.append(f"WARNING: end of turn trained in {ended:,} of {train.answers:,} answers only")
    sample = train.samples[0]
    lines.append(f"row {sample.row}, prompt and answers, trained tokens in ⟦ ⟧:")
    return [*lines, *(f"  {line}" for line in shown(sample, tokenizer))]


def shown(sample: Rated, tokenizer: Tokenizer, limit: int = 700) -> list[str]:
    """The prompt and each answer of `sample` as text, trained tokens in ⟦ ⟧."""
    lines = [_short("".join(text for text, _ in marked_text(prompt_of(sample), tokenizer)), limit)]
    for number, answer in enumerate(sample.answers):
        text = "".join(
            f"⟦{part}⟧" if trained else part for part, trained in marked_text(answer, tokenizer)
        )
        lines.append(f"{title(sample, number)}: {_short(text, limit)}")
    return [line.replace("\n", "\n  ") for line in lines]


def prompt_of(sample: Rated) -> Sample:
    """The prompt of `sample` with its images, as a row without a trained token."""
    marks = np.zeros(len(sample.prompt), np.bool_)
    return Sample(sample.row, sample.prompt, marks, images=sample.prompt_images)


def title(sample: Rated, number: int) -> str:
    """What an answer is: chosen, rejected, reference, good, bad."""
    if len(sample.answers) > 1:
        return ("chosen", "rejected", "reference")[number]
    return "answer" if sample.value is None else ("bad", "good")[int(sample.value)]


def _short(text: str, limit: int) -> str:
    return text[:limit] + (" …" if len(text) > limit else "")
