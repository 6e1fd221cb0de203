"""Rows that judge answers: pairs (chosen, rejected; and a reference), single ones with a label,
labelled steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.data import illustrated
from topwork.data.formats import (
    Chat,
    Completion,
    Format,
    Message,
    extras_of,
    is_chat,
    is_text_or_chat,
    messages_of,
)
from topwork.data.rows import Row
from topwork.errors import DataError

YES, NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no", "-1")


@dataclass(frozen=True)
class Answered:
    """A prompt and its answers, all of them texts or all of them messages.

    `value`: what the row says of them: the margin of a pair, 1 or 0 for a good or bad answer.
    `images`: those of the row's column, not read yet.
    """

    prompt: str | list[Message]
    answers: tuple[Any, ...]
    value: float | None = None
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    images: tuple[Any, ...] = ()

    def examples(self) -> list[Chat | Completion]:
        """Each answer with the prompt before it, as fine-tuning knows them. DataError for images
        that do not go with the messages."""
        if isinstance(self.prompt, str):
            return [Completion(self.prompt, answer, self.images) for answer in self.answers]
        begin, made = len(self.prompt), []
        for answer in self.answers:
            chat, images = illustrated.within([*self.prompt, *answer], self.images)
            made.append(Chat(chat, begin, self.tools, self.variables, images))
        return made


@dataclass(frozen=True)
class Stepwise:
    """A prompt, the steps of an answer, and whether each is right."""

    prompt: str
    steps: list[str]
    labels: list[float]


def _has_pair(row: Row) -> bool:
    prompt = row.get("prompt")
    return (
        is_text_or_chat(row.get("chosen"))
        and is_text_or_chat(row.get("rejected"))
        and (prompt is None or is_text_or_chat(prompt))
    )


def _pair(row: Row) -> Answered:
    margin = row.get("margin")
    try:
        value = None if margin in (None, "") else float(margin)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"margin={margin!r} is no number") from None
    prompt, answers = _taken_apart(row.get("prompt"), (row["chosen"], row["rejected"]))
    return Answered(prompt, answers, value, **_more(row, prompt))


def _triple(row: Row) -> Answered:
    parts = row["chosen"], row["rejected"], row["reference"]
    prompt, answers = _taken_apart(row.get("prompt"), parts)
    return Answered(prompt, answers, None, **_more(row, prompt))


def _judged(row: Row) -> Answered:
    prompt, answers = _taken_apart(row["prompt"], (row["completion"],))
    return Answered(prompt, answers, truth(row["label"]), **_more(row, prompt))


def _prompted(row: Row) -> Answered:
    """The SFT rows with an answer, where only answers count (distillation)."""
    prompt, answers = _taken_apart(row["prompt"], (row["completion"],))
    return Answered(prompt, answers, None, **_more(row, prompt))


def _more(row: Row, prompt: str | list[Message]) -> dict[str, Any]:
    images = tuple(illustrated.beside(row))
    return {"images": images, **({} if isinstance(prompt, str) else extras_of(row))}


def truth(label: Any) -> float:
    """1.0 or 0.0 for what rows call right and wrong. DataError for anything else."""
    if isinstance(label, bool) or label in (0, 1):
        return float(label)
    if isinstance(label, str) and label.strip().lower() in (*YES, *NO):
        return float(label.strip().lower() in YES)
    raise DataError(f"label={label!r} is neither true nor false")


def _steps(row: Row) -> Stepwise:
    if illustrated.beside(row):
        raise DataError("it has images, which models of process rewards do not read")
    steps, labels = list(row["completions"]), [truth(x) for x in row["labels"]]
    if len(steps) != len(labels):
        raise DataError(f"{len(steps)} completions, but {len(labels)} labels")
    return Stepwise(row["prompt"], steps, labels)


def _has_steps(row: Row) -> bool:
    steps, labels = row.get("completions"), row.get("labels")
    return (
        isinstance(row.get("prompt"), str)
        and isinstance(steps, Sequence)
        and len(steps) > 0
        and all(isinstance(s, str) for s in steps)
        and isinstance(labels, Sequence)
    )


PAIRS = (Format("preference", "(prompt,) chosen, rejected (, margin)", _has_pair, _pair),)
JUDGED = (
    Format(
        "unpaired preference",
        "prompt, completion, label",
        lambda r: (
            is_text_or_chat(r.get("prompt"))
            and is_text_or_chat(r.get("completion"))
            and "label" in r
        ),
        _judged,
    ),
    *PAIRS,
)
TRIPLES = (
    Format(
        "triple preference",
        "(prompt,) chosen, rejected, reference",
        lambda r: _has_pair(r) and is_text_or_chat(r.get("reference")),
        _triple,
    ),
)
STEPS = (Format("stepwise", "prompt, completions, labels (a list each)", _has_steps, _steps),)


def _taken_apart(prompt: Any, answers: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The prompt and the answers without it, all as texts or all as messages.

    Without a prompt (or when each answer repeats it) the prompt is what the answers begin with.
    """
    if not any(is_chat(part, "role") for part in (prompt, *answers)):
        texts = tuple(str(a) for a in answers)
        begin = _common_text(texts) if prompt is None else str(prompt)
        rest = tuple(t[len(begin) :] for t in texts) if prompt is None else texts
        if not all(rest):
            raise DataError("an answer is empty")
        return begin, rest
    chats = [_as_chat(a, "assistant") for a in answers]
    before = [] if prompt is None else _as_chat(prompt, "user")
    if before and all(chat[: len(before)] == before for chat in chats):
        chats = [chat[len(before) :] for chat in chats]
    elif all(chat[0]["role"] != "assistant" for chat in chats):  # whole conversations
        before = []
    if not before:
        size = _common(chats)
        before, chats = chats[0][:size], [chat[size:] for chat in chats]
    if not all(any(m["role"] == "assistant" for m in chat) for chat in chats):
        raise DataError(
            "an answer has no assistant message of its own: chosen and rejected must part ways "
            "before their last one"
        )
    return before, tuple(chats)


def _as_chat(part: Any, role: str) -> list[Message]:
    if is_chat(part, "role"):
        return messages_of(part)
    return [{"role": role, "content": str(part)}]


def _common(rows: Sequence[Sequence[Any]]) -> int:
    """How many items all `rows` begin with alike."""
    shortest = min(len(r) for r in rows)
    return next((i for i in range(shortest) if any(r[i] != rows[0][i] for r in rows)), shortest)


def _common_text(texts: Sequence[str]) -> str:
    """What all texts begin with, up to the end of a word."""
    size = _common(texts)
    if all(len(t) > size and t[size].isspace() for t in texts):
        return texts[0][:size]
    while size and not texts[0][size - 1 : size].isspace():
        size -= 1
    return texts[0][:size].rstrip()
