"""Chat templates: jinja in its immutable sandbox, rendered as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from topwork.errors import DataError

LONGEST = 10_000_000  # characters: a template that writes more is broken, or means harm


class TemplateError(DataError):
    """A chat template that cannot render these messages, or not with certainty."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: notes where the assistant's own text stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_keep")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _keep(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja's own filter this one escapes nothing for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise JinjaError(message)


@lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except JinjaError as error:
        raise TemplateError(f"the chat template does not parse: {error}") from error


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text that the template `source` makes of `messages`.

    `variables` are the special tokens and whatever else the template reads. Raises TemplateError
    with the template's own words when it refuses.
    """
    try:
        pieces, size = [], 0
        for piece in _compiled(source).generate(
            messages=messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **variables,
        ):
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST:
                raise TemplateError(f"the chat template writes more than {LONGEST:,} characters")
        return "".join(pieces)
    except TemplateError:
        raise
    except Exception as error:  # a template may fail in any of Python's ways
        raise TemplateError(f"the chat template refuses these messages: {error}") from error
