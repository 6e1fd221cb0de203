"""Distillation: the student's next-token distributions drawn to a teacher's, on given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch, collate
from topwork.data.prepare import Prepared, Sample, opening, prepare
from topwork.data.rows import read_rows
from topwork.errors import ConfigError
from topwork.media import ImageTextProcessor
from topwork.media.placed import Placer
from topwork.objectives.answers import means
from topwork.objectives.familiar import settled
from topwork.objectives.reference import Reference
from topwork.objectives.routing import routed
from topwork.objectives.setup import adapted, at_least, load_teacher, named_sets, unread
from topwork.objectives.sft import SFTConfig, marking_of, report
from topwork.objectives.sighted import load_reader, model_class, reading
from topwork.objectives.vocabulary import added_ids
from topwork.peft import PeftConfig, PeftModel
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings
from topwork.training.precision import cast

# Of fine-tuning's settings those that distillation does not read, with values that ask for nothing.
UNREAD = {
    "loss_type": ("nll",), "label_smoothing_factor": (0,), "neftune_noise_alpha": (None, 0),
    "token_metrics": (False,), "streaming": (None, False), "eval_packing": (None, False),
}  # fmt: skip


@settings
class DistillationConfig(SFTConfig):
    """A run of distillation on given rows, which are those of fine-tuning."""

    learning_rate: float = 1e-6
    beta: float = 1.0
    """0: KL(teacher ‖ student), which covers all that the teacher says; 1: KL(student ‖ teacher),
    which stays with what it says most; between: generalised Jensen-Shannon (arXiv:2306.13649)."""
    temperature: float = 1.0
    """Divides the logits of both."""
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """What `from_pretrained` is given beside the teacher's name."""
    sft_weight: float = 0.0
    """Weight of -log p of the rows' own tokens beside the divergence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"beta={self.beta} must be in [0, 1]")
        at_least("temperature", self.temperature, 0, above=True)
        at_least("sft_weight", self.sft_weight, 0)
        if self.packing:
            raise ConfigError("packing: batches hold whole rows here, without padding anyway")
        unread(self, UNREAD, "distillation")


@dataclass(frozen=True)
class Distillation:
    """The divergence at each trained token, summed.

    `teacher`: as a reference, another model or the policy without its adapter. Rows that a student
    writes itself enter like given ones: as samples.
    """

    teacher: Reference
    beta: float = 1.0
    temperature: float = 1.0
    sft_weight: float = 0.0
    router: float | None = field(default=None, kw_only=True)
    """Weighs the routers' loss, as in `routed`."""
    placer: Placer | None = field(default=None, kw_only=True)
    """Reads the images of rows, for models that take some."""

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Sample]], world: World | None = None
    ) -> list[Batch]:
        device = next(model.parameters()).device
        with reading():
            return [collate(group, self.placer).to(device) for group in groups]

    def size(self, sample: Sample) -> int:
        return len(sample)

    def weight(self, batch: Batch) -> float:
        return len(batch.targets)

    def tokens(self, batch: Batch) -> int:
        return batch.tokens

    def rows(self, batch: Batch) -> Sequence[int]:
        return batch.rows

    def prompt(self, sample: Sample) -> Sample:
        return opening(sample)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        student: Any = model
        with routed(model, batch, self.router) as routers:
            seen = seen_at(student, batch)
        with self.teacher.of(model) as teacher:
            wanted = seen_at(teacher, batch)
            head = head_of(teacher)
        apart = ops.token_divergence(
            head_of(student), seen, head, wanted, self.beta, self.temperature
        )
        total, metrics = apart.sum(), means({"divergence": apart})
        if self.sft_weight:
            logprobs = student.token_logprobs(seen, batch.targets)
            total = total - self.sft_weight * logprobs.sum()
            metrics |= means({"nll_loss": -logprobs})
        return routers.beside(Loss(total, metrics), self.weight(batch))


def seen_at(model: Any, batch: Batch) -> Tensor:
    """The hidden states [N, C] that predict the trained tokens."""
    hidden = model.backbone(batch.input_ids, **batch.images, lengths=batch.lengths)
    return hidden[0, batch.positions]


def head_of(model: Any) -> Any:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.head


class DistillationTrainer(Trainer):
    """The trainer with the distillation objective, from the rows of fine-tuning, images included.

    `teacher_model`: a model or the name of one, with the student's vocabulary (and its processor).
    """

    config_class: ClassVar[type[DistillationConfig]] = DistillationConfig

    def __init__(
        self,
        model: nn.Module | str | Path,
        teacher_model: nn.Module | str | Path | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, self.config_class, optimizer, more)
        if train_dataset is None:
            raise ConfigError(f"{type(self).__name__} needs train_dataset")
        reader = load_reader(model, processing_class, args)
        model, tokenizer = reader.model, reader.tokenizer
        reference = self._teacher(teacher_model, args, reader)
        marking = marking_of(args, tokenizer)

        def read(rows: Any) -> Any:
            return prepare(read_rows(rows), tokenizer, marking, placer=reader.placer)

        train = read(train_dataset)
        evals = {name: read(rows) for name, rows in named_sets(eval_dataset).items()}
        self.prepared, self.prepared_eval = train, evals
        super().__init__(
            adapted(model, peft_config, added_ids(tokenizer, args)),
            args,
            replace(
                self._objective(args, reference, tokenizer, train),
                router=args.router_aux_loss_coef,
                placer=reader.placer,
            ),
            train.samples,
            {name: p.samples for name, p in evals.items()},
            tokenizer=reader.processing,
            callbacks=callbacks,
            optimizer=optimizer,
            data_fingerprint=train.fingerprint,
            notes=report(train, tokenizer, evals),
        )
        if reference.model is not None:
            if args.bf16 is not None:
                cast(reference.model, args.bf16)
            reference.model.to(self.device)

    def _teacher(self, given: nn.Module | str | Path | None, args: Any, reader: Any) -> Reference:
        """Who teaches the student that `reader` loaded."""
        if given is None:
            raise ConfigError(f"{type(self).__name__} needs teacher_model")
        teacher = load_teacher(given, args, model_class(reader))
        _check_pair(reader.model, teacher)
        return Reference(teacher)

    def _objective(
        self, args: Any, teacher: Reference, tokenizer: Tokenizer, train: Prepared
    ) -> Distillation:
        return Distillation(teacher, args.beta, args.temperature, args.sft_weight)


def _check_pair(student: Any, teacher: Any) -> None:
    """ConfigError unless both are models of ours over one vocabulary."""
    if teacher is student:
        raise ConfigError("teacher_model is the student itself")
    for name, model in (("model", student), ("teacher_model", teacher)):
        if not callable(getattr(model, "backbone", None)):
            raise ConfigError(f"{name}: load it with topwork.AutoModelForCausalLM")
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"student and teacher have vocabularies of {sizes[0]} and {sizes[1]}")


__all__ = ["Distillation", "DistillationConfig", "DistillationTrainer"]
