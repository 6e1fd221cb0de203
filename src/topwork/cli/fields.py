"""`topwork fields`: what a run's file may say, from the configurations themselves."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from topwork.errors import ConfigError, nearest


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and its bases, by field."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not is_dataclass(part):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for line, following in itertools.pairwise(body):
            text = following.value if isinstance(following, ast.Expr) else None
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(text, ast.Constant)
            ):
                found[line.target.id] = inspect.cleandoc(str(text.value))
    return found


def page(name: str | None) -> Iterator[str]:
    """The fields of an objective or of an adapter's method in lines; without a name, the names."""
    from topwork.objectives.registry import OBJECTIVES
    from topwork.peft import methods

    adapters = {kind.lower(): kind for kind in methods.NAMES}
    if name is None:
        yield "objectives (objective: NAME in the file):"
        yield from _wrapped(", ".join(OBJECTIVES))
        yield "adapters (adapter: {peft_type: NAME, …}):"
        yield from _wrapped(", ".join(adapters))
        return
    if name in OBJECTIVES:
        entry = OBJECTIVES[name]
        if entry.models:
            yield f"beside model and data: {', '.join(entry.models)}"
        cls = entry.config
    elif name.lower() in adapters:
        cls = methods.config_class(adapters[name.lower()])
    else:
        known = (*OBJECTIVES, *adapters)
        raise ConfigError(f"{name!r} is no objective and no adapter{nearest(name, known)}")
    docs = field_docs(cls)
    for field in fields(cls):
        yield f"{field.name}: {field.type}{_default(field)}"
        yield from _wrapped(docs.get(field.name, ""))


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not MISSING:
        return f" = {field.default_factory()!r}"
    return ""


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="    ")
