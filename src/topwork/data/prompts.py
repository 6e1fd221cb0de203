"""Prompts that are to be answered, as a model of images in texts reads them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from topwork.data import illustrated
from topwork.data.rows import Row
from topwork.errors import DataError
from topwork.media.image_text import listed
from topwork.media.placed import Placed, Placer
from topwork.text import Tokenizer
from topwork.text.spans import apply


def written(
    row: Row, tokenizer: Tokenizer, placer: Placer, tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[int], tuple[Placed, ...]]:
    """The ids of the row's `prompt`, a text or messages, the generation prompt included, and its
    images at their places. DataError where they do not fit each other, or the family."""
    given = row["prompt"]
    if isinstance(given, str):
        images: Sequence[Any] = illustrated.beside(row)
        text = placer.prompt(given)
    else:
        if placer.template is None:
            raise DataError("this family has no chats: give `prompt` as a text")
        messages, images = illustrated.within(given, illustrated.beside(row))
        text = tokenizer.apply_chat_template(
            [listed(message) for message in messages],
            chat_template=placer.template,
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
        )
    chat = not isinstance(given, str)
    sizes = placer.sizes(images)
    edits = placer.edits(text, sizes, chat=chat)
    whole, spans = apply(edits, text)
    found = tokenizer(whole, add_special_tokens=not chat, return_offsets_mapping=True)
    begins, ends = zip(*found["offset_mapping"]) if found["input_ids"] else ((), ())
    places = spans[len(spans) - len(images) :]  # before them may stand the text's beginning
    placed = (
        Placed(image, size, bisect_right(ends, start), bisect_left(begins, stop))
        for image, size, (start, stop) in zip(images, sizes, places)
    )
    return list(found["input_ids"]), tuple(placed)
