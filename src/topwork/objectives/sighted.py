"""Models that read images in their texts, with the processors that write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from topwork import hub
from topwork.errors import ConfigError, DataError, TrainingError
from topwork.media import AutoProcessor, ImageTextProcessor
from topwork.media.placed import Placer
from topwork.models import AutoModelForCausalLM, AutoModelForImageTextToText
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES
from topwork.models.multimodal import ImageTextModel
from topwork.objectives.labelled import base
from topwork.objectives.setup import beside, load_pair, where
from topwork.objectives.vocabulary import add_words
from topwork.text import AutoTokenizer, Tokenizer


@dataclass(frozen=True)
class Reader:
    """What reads a run's rows. `processing`, which is saved with the model, is the tokenizer or the
    processor around it, whose images `placer` writes."""

    model: nn.Module
    tokenizer: Tokenizer
    processing: Any
    placer: Placer | None = None


def load_reader(model: nn.Module | str | Path, processing: Any, args: Any) -> Reader:
    """The model, loaded if it is a name, and its tokenizer or processor as `args` say.

    ConfigError for a processor of images with a model that reads none, and the other way round for
    one that does not write them as the model reads them.
    """
    auto: Any = AutoModelForCausalLM
    if isinstance(model, (str, Path)) and _reads_images(model, args):
        processing = processing or AutoProcessor.from_pretrained(model, **where(args))
        auto = AutoModelForImageTextToText
    if processing is None and isinstance(base(model), ImageTextModel):
        processing = beside(model, AutoProcessor)
    if processing is None or isinstance(processing, Tokenizer):
        model, tokenizer = load_pair(model, processing, args, auto)
        return Reader(model, tokenizer, tokenizer)
    if not isinstance(processing, ImageTextProcessor):
        raise ConfigError(
            f"processing_class is a {type(processing).__name__}, which reads no images and no "
            "texts for training: pass a tokenizer, or the AutoProcessor of a model of images in "
            "texts"
        )
    model, _ = load_pair(model, processing.tokenizer, args, auto)
    inner: Any = base(model)
    if not isinstance(inner, ImageTextModel):
        raise ConfigError(
            f"{type(inner).__name__} reads no images in its texts: pass the processor's tokenizer "
            "as processing_class, and rows without images"
        )
    placer = Placer(processing)
    if placer.inside() != inner.spec.image_token:
        raise ConfigError(
            f"the processor writes images as token {placer.inside()}, but the model reads them at "
            f"token {inner.spec.image_token}: take the processor that belongs to the model"
        )
    _settle(processing, args, inner.config.model_type)
    return Reader(model, processing.tokenizer, processing, placer)


def load_writers(name: str | Path, args: Any, images: bool) -> tuple[Tokenizer, Placer | None]:
    """What writes the texts of the checkpoint `name`, and its images where it reads some and
    `images` are asked for: what `load_reader` would take, without the model."""
    kind = _reads_images(name, args) if images else None
    if kind is None:
        tokenizer = AutoTokenizer.from_pretrained(name, **where(args))
        if args.chat_template is not None:
            tokenizer.chat_template = args.chat_template
        add_words(tokenizer, args)
        return tokenizer, None
    processing: Any = AutoProcessor.from_pretrained(name, **where(args))
    _settle(processing, args, kind)
    add_words(processing.tokenizer, args)
    return processing.tokenizer, Placer(processing)


@contextmanager
def reading() -> Iterator[None]:
    """Within it an image that cannot be read stops the run: TrainingError, not DataError."""
    try:
        yield
    except DataError as error:
        raise TrainingError(str(error)) from error


def _settle(processing: ImageTextProcessor, args: Any, kind: str) -> None:
    """Give it the template of `args`. ConfigError for what has no meaning with this family."""
    if args.chat_template is not None:
        processing.chat_template = args.chat_template
    if not processing.style.chats and getattr(args, "completion_only_loss", None) is False:
        raise ConfigError(
            f"completion_only_loss=False: the prompts of {kind} see all of "
            "themselves, so there is nothing to predict in them"
        )
    if getattr(args, "neftune_noise_alpha", None):
        raise ConfigError("neftune_noise_alpha does not go with images: leave it out")


def model_class(reader: Reader) -> Any:
    """What loads another model of the reader's kind."""
    return AutoModelForCausalLM if reader.placer is None else AutoModelForImageTextToText


def _reads_images(name: str | Path, args: Any) -> str | None:
    """The family of the checkpoint of this name if it reads images in texts, else None."""
    files = hub.resolve(name, want=("config",), **where(args))
    if "config.json" not in files.files:
        return None
    kind = files.json("config.json").get("model_type")
    return kind if kind in NAMES and set(tasks_of(kind)) == {"image-text-to-text"} else None


def described(samples: Sequence[Any]) -> list[str]:
    """How many images the samples have, in words; nothing where they have none."""
    lists = [images for images in (getattr(s, "images", ()) for s in samples) if images]
    if not lists:
        return []
    tokens = sum(image.stop - image.start for images in lists for image in images)
    return [
        f"images: {sum(map(len, lists)):,} in {len(lists):,} rows, written as {tokens:,} tokens "
        "that are not trained; their pixels are read as batches need them"
    ]
