"""What holds while a model computes must hold while activation checkpointing computes it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

_CARRIED: list[ContextVar[Any]] = []


def carried(variable: ContextVar[Any]) -> ContextVar[Any]:
    """Register `variable`: its value in the forward pass holds in the recomputation too."""
    _CARRIED.append(variable)
    return variable


def remembered() -> dict[str, Any]:
    """Arguments for torch's `checkpoint`; none where no registered variable is set."""
    if torch.compiler.is_compiling():
        return {}  # what a graph computes again was traced within the same values
    held = [(v, v.get(None)) for v in _CARRIED]
    held = [(variable, value) for variable, value in held if value is not None]
    return {"context_fn": lambda: (nullcontext(), _again(held))} if held else {}


@contextmanager
def _again(held: list[tuple[ContextVar[Any], Any]]) -> Iterator[None]:
    tokens = [(variable, variable.set(value)) for variable, value in held]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)
