"""A mark set at the end or the start of a message's own text, to see where a template puts it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
WAYS = ("calls", "content", "blanks")
EXTRA = "zz"  # an argument that is added to a call when its last one is no text


@dataclass(frozen=True)
class Marked:
    """Messages with marks. `exact`: without the marks they are the original ones."""

    messages: list[Message]
    exact: bool


def mark_end(message: Message, mark: str, way: str = "calls") -> tuple[Message, bool]:
    """`message` with `mark` behind the last thing that it says, and whether that is an insertion
    and nothing more.

    `way` "calls": in the tool calls, or else in the content before its trailing blanks; "content":
    there in any case; "blanks": behind the content's trailing blanks.
    """
    calls = message.get("tool_calls")
    if calls and way == "calls":
        call, exact = _mark_call(calls[-1], mark)
        return {**message, "tool_calls": [*calls[:-1], call]}, exact
    content = message.get("content")
    if isinstance(content, list):
        for at in range(len(content) - 1, -1, -1):
            part = content[at]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                part = {**part, "text": _behind(part["text"], mark, way)}
                return {**message, "content": [*content[:at], part, *content[at + 1 :]]}, True
        return {**message, "content": [*content, {"type": "text", "text": mark}]}, True
    return {**message, "content": _behind(_text(content), mark, way)}, True


def mark_start(message: Message, mark: str, whole: bool) -> Message:
    """`message` with `mark` before its content, or with `mark` as its `whole` content."""
    changed = dict(message)
    content = message.get("content")
    if whole:
        changed["content"] = [{"type": "text", "text": mark}] if isinstance(content, list) else mark
    elif isinstance(content, list):
        changed["content"] = [{"type": "text", "text": mark}, *content]
        if content and isinstance(content[0], Mapping) and isinstance(content[0].get("text"), str):
            first = {**content[0], "text": mark + content[0]["text"]}
            changed["content"] = [first, *content[1:]]
    else:
        changed["content"] = mark + _text(content)
    return changed


def trailing_blanks(message: Message) -> str:
    """The blanks at the end of the message's text."""
    content = message.get("content")
    if isinstance(content, list):
        content = content[-1].get("text") if content and isinstance(content[-1], Mapping) else None
    text = _text(content)
    return text[len(text.rstrip()) :]


def _text(content: Any) -> str:
    return "" if content is None else str(content)


def _behind(text: str, mark: str, way: str = "content") -> str:
    body = text if way == "blanks" else text.rstrip()
    return body + mark + text[len(body) :]


def _mark_call(call: Any, mark: str) -> tuple[Any, bool]:
    function = call.get("function") if isinstance(call.get("function"), Mapping) else call
    arguments, exact = _mark_arguments(function.get("arguments"), mark)
    changed = {**function, "arguments": arguments}
    return (changed if function is call else {**call, "function": changed}), exact


def _mark_arguments(arguments: Any, mark: str) -> tuple[Any, bool]:
    """The arguments of a call (an object, or its JSON text) with `mark` at their end."""
    if isinstance(arguments, str):
        body = arguments.rstrip()
        if body.endswith('"}'):
            return body[:-2] + mark + '"}' + arguments[len(body) :], True
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            return _behind(arguments, mark), True
        comma = ", " if parsed else ""
        return body[:-1] + f'{comma}"{EXTRA}": "{mark}"' + "}", False
    if not isinstance(arguments, Mapping):
        return {EXTRA: mark}, False
    last = next(reversed(arguments), None) if arguments else None
    if last is not None and isinstance(arguments[last], str):
        return {**arguments, last: arguments[last] + mark}, True
    return {**arguments, EXTRA: mark}, False
