"""The images of training rows: within messages, or in a column beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from topwork.data.rows import Row
from topwork.errors import DataError
from topwork.media.image_text import images_of
from topwork.media.images import is_one

COLUMNS = ("images", "image")
KINDS = ("image", "image_url")


def beside(row: Row) -> list[Any]:
    """The images in the row's `images` or `image` column."""
    for name in COLUMNS:
        found = row.get(name)
        if found is not None:
            images = [found] if is_one(found) else list(found)
            return [image for image in images if image is not None]
    return []


def any_in(row: Row, messages: Any) -> bool:
    """Whether the row has images, beside its `messages` (or text) or within them."""
    listed = [] if isinstance(messages, str) else messages or []
    chat = [m for m in listed if isinstance(m, Mapping)]
    return bool(beside(row)) or any(_is_image(e) for m in chat for e in _entries(m))


def within(
    messages: Sequence[Mapping[str, Any]], given: Sequence[Any]
) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """`messages` with a bare {"type": "image"} for each image, and the images in their order.

    `given`, the images beside the messages, are those of the entries that hold none; where no
    message has an entry they stand before the first question. DataError where they are not as many.
    """
    rest, images = list(given), []
    made = [dict(message) for message in messages]
    if rest and not any(_is_image(entry) for message in made for entry in _entries(message)):
        first = next((m for m in made if m["role"] == "user"), None)
        if first is None:
            raise DataError("the row has images, but no message of the user's to put them in")
        entries = _entries(first) or [{"type": "text", "text": first["content"]}]
        first["content"] = [*({"type": "image"} for _ in rest), *entries]
    for number, message in enumerate(made):
        if not _entries(message):
            continue
        entries = []
        for entry in _entries(message):
            if not _is_image(entry):
                kept = isinstance(entry, Mapping)
                entries.append({k: v for k, v in entry.items() if v is not None} if kept else entry)
                continue
            own = images_of([{"content": [entry]}])
            if not own and not rest:
                raise DataError(
                    f"message {number} has more images than the row: put each into its entry "
                    '({"type": "image", "image": …}) or into the row\'s images column'
                )
            images.append(own[0] if own else rest.pop(0))
            entries.append({"type": "image"})
        message["content"] = entries
    if rest:
        raise DataError(
            f"the row's images column has {len(given)} images, of which {len(rest)} have no "
            '{"type": "image"} in its messages'
        )
    return made, tuple(images)


def _entries(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return list(content) if isinstance(content, (list, tuple)) else []


def _is_image(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("type") in KINDS
