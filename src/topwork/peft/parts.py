"""What layers are told of the tokens of a pass, while a layer computes a part of them alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from topwork.ops.recompute import Carried


class Told(Protocol):
    """Something that is told token by token, or row by row."""

    def part(self, shape: torch.Size, dim: int, index: Tensor) -> Self:
        """The same for the part `index` along `dim` of a layer's input of `shape`."""
        ...


T = TypeVar("T", bound=Told)
_TOLD: list[Carried[Any]] = []


def told(variable: Carried[T]) -> Carried[T]:
    """Register `variable`: adapters of single rows see their rows' part of its value."""
    _TOLD.append(variable)
    return variable


@contextmanager
def telling(variable: Carried[T], value: T) -> Iterator[None]:
    """Within it `variable` has `value`."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def narrowed(shape: torch.Size, dim: int, index: Tensor) -> Iterator[None]:
    """Within it a layer computes the part `index` along `dim` of an input of `shape`."""
    # What this thread was told, and no other one that traces or trains meanwhile.
    held = [(carried, carried.variable.get()) for carried in _TOLD]
    parts = [(v, value.part(shape, dim, index)) for v, value in held if value is not None]
    tokens = [(variable, variable.set(part)) for variable, part in parts]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)
