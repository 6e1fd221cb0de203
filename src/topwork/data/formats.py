"""Recognising what rows hold, and bringing each to one of a few canonical examples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from topwork.data import illustrated
from topwork.data.rows import Row
from topwork.errors import DataError, nearest

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation. The assistant's messages from index `trained_from` on are trained.

    `images` are those of its {"type": "image"} entries, in order, not read yet.
    """

    messages: list[Message]
    trained_from: int = 0
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Completion:
    """Plain text in two parts, of which the second is trained."""

    prompt: str
    completion: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Text:
    """Plain text, trained whole."""

    text: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Ids that were made elsewhere; `labels` -100 where a token is not trained."""

    input_ids: list[int]
    labels: list[int] | None = None
    images: ClassVar[tuple[Any, ...]] = ()


Example = Chat | Completion | Text | Tokens

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialog")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Format:
    """One way to write training rows: `holds` recognises a row, `read` makes its example."""

    name: str
    what: str
    holds: Callable[[Row], bool]
    read: Callable[[Row], Any]

    @property
    def columns(self) -> set[str]:
        """The words of `what` that may be columns."""
        return set(re.findall(r"[a-z_]{4,}", self.what))


def recognise(
    rows: Sequence[Row], text_field: str = "text", known: Sequence[Format] | None = None
) -> Format:
    """The format of all `rows`, one of `known` (default: those of fine-tuning).

    DataError naming the first row that has none, or another one.
    """
    known = known or formats(text_field)
    first = next((f for f in known if f.holds(rows[0])), None)
    if first is None:
        columns = list(rows[0])
        hints = "".join(
            nearest(str(c), sorted({w for f in known for w in f.columns})) for c in columns
        )
        raise DataError(
            f"the rows have the columns {columns}{hints}; known are: "
            + "; ".join(f.what for f in known)
        )
    for number, row in enumerate(rows):
        if not first.holds(row):
            raise DataError(
                f"row {number} is not in the {first.name} format of row 0: its columns are "
                f"{ {k: type(v).__name__ for k, v in row.items()} }"
            )
    return first


def formats(text_field: str = "text") -> tuple[Format, ...]:
    """All formats of training rows, the most specific first."""

    def text_of(row: Row) -> Text:
        return Text(row[text_field], tuple(illustrated.beside(row)))

    return (
        Format("tokens", "input_ids (and labels)", lambda r: "input_ids" in r, _tokens),
        Format(
            "prompt-completion",
            "prompt + completion (texts, or messages)",
            lambda r: is_text_or_chat(r.get("prompt")) and is_text_or_chat(r.get("completion")),
            _prompt_completion,
        ),
        Format("messages", "messages (role, content)", lambda r: _has_chat(r, "role"), _chat),
        Format("sharegpt", "conversations (from, value)", lambda r: _has_chat(r, "from"), _chat),
        Format(
            "alpaca",
            "instruction (+ input) + output",
            lambda r: isinstance(r.get("instruction"), str) and isinstance(r.get("output"), str),
            _alpaca,
        ),
        Format(
            "text", f"{text_field} (plain text)", lambda r: isinstance(r.get(text_field), str),
            text_of,
        ),
    )  # fmt: skip


def is_text_or_chat(value: Any) -> bool:
    return isinstance(value, str) or is_chat(value, "role")


def is_chat(value: Any, key: str) -> bool:
    value = _parsed(value)
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(m, Mapping) and key in m for m in value)
        and len(value) > 0
    )


def _parsed(value: Any) -> Any:
    """Messages may come as a JSON text (in CSV files)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _chat_column(row: Row, key: str) -> str | None:
    return next((c for c in CHAT_COLUMNS if is_chat(row.get(c), key)), None)


def _has_chat(row: Row, key: str) -> bool:
    return _chat_column(row, key) is not None


def message(given: Mapping[str, Any]) -> Message:
    """One message with the roles and keys that chat templates know."""
    if "role" not in given and "from" not in given:
        raise DataError(f"a message has no role: {dict(given)}")
    role = str(given.get("role", given.get("from")))
    known = ROLES.get(role.lower())
    if known is None:
        raise DataError(f"role {role!r} is not known{nearest(role, ROLES)}")
    kept = {k: v for k, v in given.items() if k not in ("from", "value", "role") and v is not None}
    content = given.get("content", given.get("value"))
    if known == "function_call":
        call = json.loads(content) if isinstance(content, str) else content
        return {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": call}]}  # fmt: skip
    return {**kept, "role": known, "content": "" if content is None else content}


def messages_of(value: Any) -> list[Message]:
    return [message(m) for m in _parsed(value)]


def extras_of(row: Row) -> dict[str, Any]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    return {"tools": tools or None, "variables": dict(row.get("chat_template_kwargs") or {})}


def _chat(row: Row) -> Chat:
    column = _chat_column(row, "role") or _chat_column(row, "from")
    chat = messages_of(row[column or "messages"])
    system = row.get("system")
    if isinstance(system, str) and system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    if not any(m["role"] == "assistant" for m in chat):
        raise DataError("the conversation has no assistant message, so nothing to train")
    chat, images = illustrated.within(chat, illustrated.beside(row))
    return Chat(chat, images=images, **extras_of(row))


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not is_chat(prompt, "role"):
            return Completion(prompt, completion, tuple(illustrated.beside(row)))
    elif isinstance(prompt, str) != isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
    before, after = messages_of(prompt), messages_of(completion)
    chat, images = illustrated.within([*before, *after], illustrated.beside(row))
    return Chat(chat, len(before), images=images, **extras_of(row))


def _alpaca(row: Row) -> Chat:
    task, given = row["instruction"], row.get("input")
    asked = f"{task}\n\n{given}" if given else task
    history = [
        {"role": role, "content": text}
        for pair in row.get("history") or []
        for role, text in zip(("user", "assistant"), pair)
    ]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    chat = [*system, *history, {"role": "user", "content": asked}]
    answer = {"role": "assistant", "content": row["output"]}
    whole, images = illustrated.within([*chat, answer], illustrated.beside(row))
    return Chat(whole, len(chat), images=images)


def _tokens(row: Row) -> Tokens:
    if illustrated.beside(row):
        raise DataError("input_ids beside images: give messages, or a prompt and a completion")
    ids, labels = list(row["input_ids"]), row.get("labels")
    if labels is None and row.get("completion_mask") is not None:
        labels = [i if m else -100 for i, m in zip(ids, row["completion_mask"])]
    if labels is not None and len(labels) != len(ids):
        raise DataError(f"{len(ids)} input_ids, but {len(labels)} labels")
    return Tokens(ids, None if labels is None else list(labels))


def as_prompt(chat: Chat, token: str) -> Completion:
    """A single question and answer, for a family that reads prompts alone: its images first, each
    as `token`."""
    roles = [m["role"] for m in chat.messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"this family reads no chats, only one question and its answer; the roles are {roles}"
        )
    asked, answer = (_text_of(m["content"]) for m in chat.messages)
    return Completion(token * len(chat.images) + asked, answer, chat.images)


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(e["text"] for e in content if isinstance(e, Mapping) and "text" in e)


def without_template(chat: Chat) -> Completion:
    """A single question and answer as the Alpaca text, for a tokenizer that has no template."""
    roles = [m["role"] for m in chat.messages]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        raise DataError(
            "the tokenizer has no chat template, and only a single question and answer can be "
            f"written without one; the roles are {roles}. Set tokenizer.chat_template"
        )
    asked, answer = chat.messages[-2]["content"], chat.messages[-1]["content"]
    system = f"{chat.messages[0]['content']}\n\n" if roles[0] == "system" else ""
    return Completion(system + ALPACA.format(instruction=asked), answer)
