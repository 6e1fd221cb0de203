"""Python functions as tools: type hints and a Google-style docstring → a JSON schema."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from topwork.errors import DataError

PLAIN: dict[Any, str] = {
    int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null",
    list: "array", tuple: "array", dict: "object",
}  # fmt: skip
SCALARS = (int, float, str, bool, type(None))


def as_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    """Each tool as a JSON schema: given as one, or as a function."""
    if tools is None:
        return None
    made = []
    for tool in tools:
        if callable(tool):
            made.append(get_json_schema(tool))
        elif isinstance(tool, dict):
            made.append(tool)
        else:
            raise DataError(f"a tool is a function or a JSON schema, not {tool!r}")
    return made


def get_json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function, for a chat template.

    Raises DataError that names the argument when it has no type hint, none that JSON can say, or
    no description in the docstring's `Args:`.
    """
    name = getattr(function, "__name__", "operation")
    text = inspect.getdoc(function)
    if not text:
        raise DataError(f"{name}: a tool needs a docstring that says what it does")
    summary, described, returned = _docstring(text)
    hints, signature = get_type_hints(function), inspect.signature(function)
    properties, required = {}, []
    for index, (argument, parameter) in enumerate(signature.parameters.items()):
        if argument not in hints:
            if index == 0 and argument in ("self", "cls"):
                continue
            raise DataError(f"{name}: the argument {argument!r} has no type hint")
        if argument not in described:
            raise DataError(f"{name}: the docstring's Args do not describe {argument!r}")
        try:
            schema = _of_hint(hints[argument])
        except TypeError as error:
            raise DataError(f"{name}: the argument {argument!r}: {error}") from error
        properties[argument] = _described(name, argument, schema, described[argument])
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    made = {"name": name, "description": summary, "parameters": parameters}
    if "return" in hints:
        try:
            made["return"] = _of_hint(hints["return"])
            if returned is not None:
                made["return"]["description"] = returned
        except TypeError:  # the model never writes it: it is left out
            pass
    return {"type": "function", "function": made}


def _described(name: str, argument: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    """`schema` with its description, and the choices that the description ends with."""
    choices = re.search(r"\(choices:\s*(.*?)\)\s*$", text, flags=re.IGNORECASE)
    if choices is not None:
        try:
            values = json.loads(choices.group(1))
        except ValueError as error:
            raise DataError(f"{name}: the choices of {argument!r} are no JSON list") from error
        schema["enum"] = [v.strip() if isinstance(v, str) else v for v in values]
        text = text[: choices.start()].strip()
    schema["description"] = text
    return schema


def _of_hint(hint: Any) -> dict[str, Any]:
    """The schema of a type; TypeError when JSON has none."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, Enum):
            return _of_values([member.value for member in hint])
        if hint in PLAIN:
            return {"type": PLAIN[hint]}
        raise TypeError(f"the type {hint!r} has no JSON schema; write the tool's schema by hand")
    if origin in (Union, types.UnionType):
        return _of_union(inner)
    if origin is Literal:
        return _of_values(list(inner))
    if origin is list:
        return {"type": "array", "items": _of_hint(inner[0])}
    if origin is tuple:
        if len(inner) == 1 or ... in inner:
            raise TypeError(f"{hint} is a tuple of one element or any number; use list[…]")
        return {"type": "array", "prefixItems": [_of_hint(one) for one in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_hint(inner[1])}
    raise TypeError(f"the type {hint!r} has no JSON schema; write the tool's schema by hand")


def _of_union(inner: tuple[Any, ...]) -> dict[str, Any]:
    kinds = [_of_hint(one) for one in inner if one is not type(None)]
    schema: dict[str, Any]
    if len(kinds) == 1:
        schema = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": kinds}
    if type(None) in inner:
        schema["nullable"] = True
    return schema


def _of_values(values: list[Any]) -> dict[str, Any]:
    if not values or any(type(value) not in SCALARS for value in values):
        raise TypeError(f"the values {values} are not all texts, numbers, booleans or None")
    kinds = list(dict.fromkeys(PLAIN[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _docstring(text: str) -> tuple[str, dict[str, str], str | None]:
    """What a Google-style docstring says of the function, each argument, and the result."""
    sections: dict[str, list[str]] = {"": []}
    at = ""
    for line in text.strip().splitlines():
        head = re.fullmatch(r"\s*(Args|Returns|Raises):\s*", line)
        if head is not None:
            at = head.group(1)
            sections[at] = []
        else:
            sections[at].append(line)
    arguments: dict[str, str] = {}
    name, margin = "", None
    for line in sections.get("Args", []):
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        margin = indent if margin is None else margin
        begin = re.match(r"\s*(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line)
        if begin is not None and indent <= margin:
            name = begin.group(1)
            arguments[name] = begin.group(2).strip()
        elif name:
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    returned = None
    if "Returns" in sections:
        returned = "\n".join(sections["Returns"]).strip()
    return "\n".join(sections[""]).strip(), arguments, returned
