"""Images in training texts: their length told by their sizes, their pixels read when needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from topwork.errors import ConfigError, DataError
from topwork.media.image_processor import as_tensors
from topwork.media.image_text import ImageTextProcessor
from topwork.media.images import image_size


@dataclass(frozen=True)
class Placed:
    """An image that is not read yet: `size` (width, height), and its tokens [start, stop)."""

    source: Any
    size: tuple[int, int]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"[image {self.size[0]}x{self.size[1]}, {self.stop - self.start} tokens]"


class Illustrated(Protocol):
    """A row of tokens with its images in their order."""

    @property
    def row(self) -> int: ...

    @property
    def trained(self) -> np.ndarray: ...

    @property
    def images(self) -> tuple[Placed, ...]: ...


@dataclass
class Placer:
    """Writes images into texts as `processor` does, and makes the tensors that the model takes."""

    processor: ImageTextProcessor
    known: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.processor.style.placeholder(self.processor) is None:
            raise ConfigError(
                f"{self.processor.style.class_name} puts images beside texts, not into them: "
                "SFTTrainer needs the processor of a model that reads images in its texts"
            )
        tokenizer = self.processor.tokenizer
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token
        adds = bos is not None and whole[: 1 + len(bare)] == [tokenizer.bos_token_id, *bare]
        self._begin = bos if adds and bos is not None else ""

    @property
    def template(self) -> str | None:
        """The chat template; None for a family that reads prompts alone."""
        return self.processor.chat_template if self.processor.style.chats else None

    @property
    def token(self) -> str:
        """What stands for an image in a text."""
        return str(self.processor.style.placeholder(self.processor))

    def sizes(self, images: Sequence[Any]) -> list[tuple[int, int]]:
        """Width and height of each, by its header. DataError for what is no image."""
        options = self.processor.image_processor.options
        form = options["input_data_format"]
        return [image_size(one, f"image {i}", form) for i, one in enumerate(images)]

    def prompt(self, text: str) -> str:
        """A prompt as the family has it before its placeholders are written out."""
        return self.processor.style.text(self.processor, text)

    def edits(
        self, text: str, sizes: Sequence[tuple[int, int]], chat: bool = False
    ) -> list[tuple[int, int, str]]:
        """What goes where in `text`: (start, stop, new text) for each image in order; before a
        `chat` that lacks it, the beginning that the tokenizer gives each text.

        DataError where the placeholders are not as many as the images.
        """
        token = self.token
        count = text.count(token)
        if count != len(sizes):
            raise DataError(
                f"the text has {count} placeholders {token!r}, but the row has {len(sizes)} images"
            )
        edits = []
        if chat and self._begin and not text.startswith(self._begin):
            edits.append((0, 0, self._begin))
        at = 0
        for size in sizes:
            at = text.index(token, at)
            edits.append((at, at + len(token), self._written(size)))
            at += len(token)
        return edits

    def _written(self, size: tuple[int, int]) -> str:
        if size not in self.known:
            shape = self.processor.image_processor.shaped(*size)
            self.known[size] = self.processor.style.written(self.processor, shape)
        return self.known[size]

    def tensors(self, rows: Sequence[Illustrated]) -> dict[str, Any]:
        """What the model takes beside the tokens of `rows`, one after the other. Reads the images.

        DataError, with the number of the row, for an image that cannot be read.
        """
        found: dict[str, Any] = {}
        named = [
            (f"row {row.row}, image {i}", image.source)
            for row in rows
            for i, image in enumerate(row.images)
        ]
        if named:
            names, sources = zip(*named)
            columns, made = self.processor.image_processor.read(list(sources), names)
            images = (image for row in rows for image in row.images)
            for name, image, one in zip(names, images, made):
                if self.processor.style.written(self.processor, one) != self._written(image.size):
                    raise DataError(
                        f"{name}: was {image.size[0]} x {image.size[1]} pixels before the run and "
                        "is of another size now"
                    )
            found |= as_tensors(columns, "pt")
        types = [self.processor.style.types(row.trained) for row in rows]
        if types and types[0] is not None:
            import torch

            found["token_type_ids"] = torch.from_numpy(np.concatenate(types))[None]  # type: ignore[arg-type]
        return found

    def inside(self) -> int:
        """The id of the token that an image's features stand for."""
        token = self.processor.style.inside(self.processor)
        return int(self.processor.tokenizer.convert_tokens_to_ids(str(token)))  # type: ignore[arg-type]
