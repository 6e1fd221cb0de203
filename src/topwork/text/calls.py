"""Tool calls in what a model wrote: the usual ways to write them, read back.

<tool_call>{"name": …, "arguments": {…}}</tool_call>           Hermes, Qwen, SmolLM3
<tool_call><function=name><parameter=key>value</parameter></function></tool_call>   Qwen3-Coder
[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]                Mistral
<|python_tag|>{"name": …, "parameters": {…}}, or that alone    Llama 3
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
LISTED, PYTHON = "[TOOL_CALLS]", "<|python_tag|>"


@dataclass(frozen=True)
class Call:
    """A call of the tool `name`; `error` says why it could not be read, if so."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None

    def message(self) -> dict[str, Any]:
        """As it stands among an assistant message's `tool_calls`."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def read_calls(text: str) -> tuple[str, list[Call]]:
    """What `text` says beside its calls, and the calls in order."""
    if "<tool_call>" in text:
        calls = [_tagged(found.group(1)) for found in TAGGED.finditer(text)]
        return TAGGED.sub("", text).strip(), calls
    for mark in (LISTED, PYTHON):
        before, found, after = text.partition(mark)
        if found:
            return before.strip(), _several(after)
    plain = text.strip()
    if plain.startswith("{") and plain.endswith("}"):
        calls = _several(plain)
        if all(call.error is None for call in calls):
            return "", calls
    return text, []


def _tagged(body: str) -> Call:
    found = FUNCTION.match(body)
    if found is None:
        return _several(body)[0]
    values = {name: _value(text) for name, text in PARAMETER.findall(found.group(2))}
    return Call(found.group(1), values)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _several(body: str) -> list[Call]:
    """Calls written as JSON, one or a list of them."""
    try:
        found, _ = json.JSONDecoder().raw_decode(body.strip())
    except ValueError as error:
        return [Call("", {}, f"the call is no JSON: {error}")]
    return [_one(entry) for entry in (found if isinstance(found, list) else [found])] or [
        Call("", {}, "the list of calls is empty")
    ]


def _one(entry: Any) -> Call:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return Call("", {}, 'a call is {"name": …, "arguments": {…}}')
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _value(arguments)
    if not isinstance(arguments, dict):
        return Call(entry["name"], {}, "the arguments are no JSON object")
    return Call(entry["name"], arguments)
