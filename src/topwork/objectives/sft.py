"""Supervised fine-tuning: the log-likelihood of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from topwork.data.packing import STRATEGIES, Batch, Pack, collate, pack
from topwork.data.prepare import (
    Marking,
    Prepared,
    Sample,
    describe_losses,
    marked_text,
    opening,
    prepare,
)
from topwork.data.rows import LazyRows, read_rows
from topwork.data.stream import Stream
from topwork.errors import ConfigError
from topwork.media import ImageTextProcessor
from topwork.media.placed import Placer
from topwork.objectives.familiar import TEXTS, Familiar, settled
from topwork.objectives.language import LanguageConfig
from topwork.objectives.logprobs import score
from topwork.objectives.routing import routed
from topwork.objectives.setup import adapted, at_least, end_token, named_sets, one_of
from topwork.objectives.sighted import Reader, described, load_reader, reading
from topwork.objectives.vocabulary import added_ids
from topwork.peft import PeftConfig
from topwork.text import Tokenizer
from topwork.training import Loss, Trainer, TrainerCallback, distributed
from topwork.training.familiar import settings
from topwork.training.objective import beside

LOSSES = ("nll", "dft")


@settings
class SFTConfig(LanguageConfig):
    """A run of supervised fine-tuning."""

    familiar: ClassVar[dict[str, Familiar]] = TEXTS

    learning_rate: float = 2e-5
    max_length: int | None = 1024
    """Tokens kept of a row, from its start; rows that are cut are counted and told. None: all."""
    packing: bool = False
    """Rows fill packs of `max_length` tokens, which then count as the samples of a batch. Without
    it a batch holds whole rows; neither computes padding."""
    packing_strategy: str = "bfd"
    """"bfd": best fit, whole rows that do not see one another; "wrapped": one cut stream."""
    eval_packing: bool | None = None
    """None: as `packing`."""
    assistant_only_loss: bool | None = None
    """Train the assistant's turns alone; None: wherever rows have roles."""
    completion_only_loss: bool | None = None
    """Train the completion alone; None: wherever rows have a prompt."""
    dataset_text_field: str = "text"
    eos_token: str | None = None
    """Ends plain texts and completions; None: the tokenizer's."""
    chat_template: str | None = None
    """Replaces the tokenizer's template."""
    loss_type: str = "nll"
    """"nll", or "dft": each token weighted by its own probability (arXiv:2508.05629)."""
    label_smoothing_factor: float = 0.0
    """Share of each label that goes to all tokens alike."""
    neftune_noise_alpha: float | None = None
    """Size of the noise on the embeddings in training (arXiv:2310.05914)."""
    streaming: bool | None = None
    """Read rows as the run needs them, `max_steps` long; None: where they have no length and
    `max_steps` is given. They are shuffled by the thousand."""
    token_metrics: bool = False
    """Log entropy and mean_token_accuracy in training too, for one more pass through the head;
    evaluation always does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, LOSSES)
        one_of("packing_strategy", self.packing_strategy, STRATEGIES)
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length={self.max_length} must be at least 2")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ConfigError(
                f"label_smoothing_factor={self.label_smoothing_factor} must be in [0, 1)"
            )
        if self.label_smoothing_factor and self.loss_type == "dft":
            raise ConfigError("label_smoothing_factor has no meaning for the dft loss")
        at_least("neftune_noise_alpha", self.neftune_noise_alpha, 0)
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs max_length, the tokens of a pack")


@dataclass(frozen=True)
class SFT:
    """The objective: -Σ log p(token) over the trained tokens, and in models with experts `router`
    times their routers' loss (None: what the model says)."""

    loss_type: str = "nll"
    smoothing: float = 0.0
    noise: float = 0.0
    token_metrics: bool = False
    router: float | None = None
    placer: Placer | None = None
    """Reads the images of rows, for a model that takes some."""
    own_targets: int = 0
    """Labels that the adapter has itself for each text (CPT's context), trained like the row's."""

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Any]], world: Any = None
    ) -> list[Batch]:
        device = next(model.parameters()).device
        with reading():
            return [collate(_flat(group), self.placer).to(device) for group in groups]

    def size(self, sample: Sample | Pack) -> int:
        return sum(len(s) for s in _flat([sample]))

    def weight(self, batch: Batch) -> float:
        return len(batch.targets) + self.own_targets * len(batch.lengths)

    def tokens(self, batch: Batch) -> int:
        return batch.tokens

    def rows(self, batch: Batch) -> Sequence[int]:
        return batch.rows

    def prompt(self, sample: Sample | Pack) -> Sample:
        return opening(sample)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        learns = torch.is_grad_enabled()
        with routed(model, batch, self.router) as routers, beside(model) as tell:
            scored = score(
                model, batch, noise=self.noise if learns else 0.0,
                smoothing=self.smoothing if learns else 0.0,
            )  # fmt: skip
            own = tell(batch.positions, batch.targets)
        logprobs = scored.logprobs
        if self.loss_type == "dft":
            logprobs = logprobs * logprobs.detach().exp()
        metrics = {}
        if self.token_metrics or not learns:
            found = scored.statistics()
            metrics = {
                "entropy": (float(found.entropy.sum()), float(len(batch.targets))),
                "mean_token_accuracy": (float(found.hit.sum()), float(len(batch.targets))),
            }
        total = -logprobs.sum() if own is None else own - logprobs.sum()
        return routers.beside(Loss(total, metrics), float(self.weight(batch)))


def _flat(group: Sequence[Any]) -> list[Sample]:
    return [s for item in group for s in (item if isinstance(item, tuple) else (item,))]


class SFTTrainer(Trainer):
    """The trainer with the SFT objective, from rows as people have them.

    `model`: a model, or the name of one to load. Rows are messages, prompt and completion, text,
    alpaca or sharegpt, in lists, files or a `datasets.Dataset`; their format is recognised. With a
    model of images in texts and its `AutoProcessor` as `processing_class` messages may have
    {"type": "image"} entries, filled by themselves or by the column `images`.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        formatting_func: Callable[[Any], str] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, SFTConfig, optimizer, more)
        reader = load_reader(model, processing_class, args)
        model, tokenizer = reader.model, reader.tokenizer
        marking = marking_of(args, tokenizer)
        if train_dataset is None:
            raise ConfigError("SFTTrainer needs train_dataset")
        data, train = _training_data(train_dataset, reader, marking, formatting_func, args)
        evals = {
            name: _read(rows, reader, marking, formatting_func)
            for name, rows in named_sets(eval_dataset).items()
        }
        eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        self.prepared, self.prepared_eval = train, evals
        made = adapted(model, peft_config, added_ids(tokenizer, args))
        objective = SFT(
            args.loss_type,
            args.label_smoothing_factor,
            args.neftune_noise_alpha or 0.0,
            args.token_metrics,
            args.router_aux_loss_coef,
            reader.placer,
            getattr(made, "own_targets", 0),
        )
        super().__init__(
            made,
            args,
            objective,
            data,
            {name: samples_of(p, args, eval_packing) for name, p in evals.items()},
            tokenizer=reader.processing,
            callbacks=[*callbacks, *([Told(data)] if isinstance(data, Stream) else [])],
            optimizer=optimizer,
            data_fingerprint=train.fingerprint,
            notes=report(train, tokenizer, evals, isinstance(data, Stream)),
        )


def marking_of(args: SFTConfig, tokenizer: Tokenizer) -> Marking:
    """What `args` and the tokenizer say of which tokens are trained."""
    return Marking(
        assistant_only=args.assistant_only_loss is not False,
        completion_only=args.completion_only_loss is not False,
        max_length=None if args.packing and args.packing_strategy == "wrapped" else args.max_length,
        text_field=args.dataset_text_field,
        end_token=end_token(tokenizer, args.eos_token),
    )


def _read(
    rows: Any, reader: Reader, marking: Marking, formatting: Callable[[Any], str] | None
) -> Prepared:
    found = read_rows(rows)
    if formatting is not None:
        found = [{marking.text_field: formatting(row)} for row in found]
    return prepare(found, reader.tokenizer, marking, placer=reader.placer)


def _training_data(
    rows: Any, reader: Reader, marking: Marking,
    formatting: Callable[[Any], str] | None, args: SFTConfig,
) -> tuple[Sequence[Any], Prepared]:  # fmt: skip
    """The samples, and the prepared rows (of a stream: its first) that the report shows."""
    streams = args.streaming
    if streams is None:
        endless = not isinstance(rows, (str, Path)) and not hasattr(rows, "__len__")
        streams = endless and args.max_steps > 0
    if not streams:
        prepared = _read(rows, reader, marking, formatting)
        return samples_of(prepared, args, args.packing), prepared
    if args.max_steps <= 0:
        raise ConfigError("streaming needs max_steps: the rows' number is not known")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    stream = Stream(
        LazyRows(rows),
        args.max_steps * batch * distributed.join().size,
        lambda chunk: _read(chunk, reader, marking, formatting),
        lambda prepared: samples_of(prepared, args, args.packing),
        (args.seed if args.data_seed is None else args.data_seed) if args.shuffle else None,
    )
    return stream, stream.head


class Told(TrainerCallback):
    """Says at the end what a stream has read and lost."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        more["trainer"].show.lines(self.stream.lines())


def samples_of(prepared: Prepared, args: SFTConfig, packing: bool) -> Sequence[Sample | Pack]:
    """The samples of a run: rows, or packs of them."""
    if not packing or args.max_length is None:
        return prepared.samples
    return pack(prepared.samples, args.max_length, args.packing_strategy)


def report(
    train: Prepared,
    tokenizer: Tokenizer,
    evals: Mapping[str, Prepared] | None = None,
    streamed: bool = False,
) -> list[str]:
    """What the run trains on: format, counts, losses, and one row with its trained tokens marked.

    ConfigError when no end-of-turn token is trained at all in rows that were not cut: such a
    model would never stop.
    """
    kept = len(train)
    lines = [
        f"data: {train.format} format; {kept:,} of {'the first ' if streamed else ''}"
        f"{train.rows:,} rows kept, {train.tokens:,} "
        f"tokens, {train.supervised:,} of them trained "
        f"({100 * train.supervised / max(1, train.tokens):.0f} %)",
        *described(train.samples),
        *describe_losses(train),
    ]
    for name, prepared in (evals or {}).items():
        named = f"evaluation{' ' + name if name else ''}"
        lines.append(f"{named}: {len(prepared):,} of {prepared.rows:,} rows kept")
        lines += [f"{named}: {line}" for line in describe_losses(prepared)]
    ended = kept - train.unterminated
    if ended == kept:
        lines.append("end of turn: trained in every row")
    else:
        lines.append(
            f"WARNING: end of turn trained in {ended:,} of {kept:,} rows only"
            + (": the model will not learn to stop" if not ended else "")
        )
    sample = train.samples[0]
    lines.append(f"row {sample.row}, trained tokens in ⟦ ⟧:")
    text = "".join(
        f"⟦{part}⟧" if trained else part for part, trained in marked_text(sample, tokenizer)
    )
    lines.append("  " + text[:1500].replace("\n", "\n  ") + (" …" if len(text) > 1500 else ""))
    return lines


__all__ = ["SFT", "SFTConfig", "SFTTrainer"]
