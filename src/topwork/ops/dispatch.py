"""How a hot function is declared: one reference, and faster variants beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Variant(Generic[P, R]):
    """A faster implementation and the condition under which it may stand in."""

    name: str
    when: Callable[P, bool]
    run: Callable[P, R]


class Op(Generic[P, R]):
    """A function with a plain torch `reference`; the first variant that applies runs instead.

    No caller knows which ran. Each variant is tested against the reference, forward and gradient.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self.variants: list[Variant[P, R]] = []
        update_wrapper(self, reference)

    def variant(self, name: str, when: Callable[P, bool]) -> Callable[[Callable[P, R]], Any]:
        """Decorator: register `run` under `name`, used when `when(*args)` holds."""

        def register(run: Callable[P, R]) -> Callable[P, R]:
            self.variants.append(Variant(name, when, run))
            return run

        return register

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # A compiled graph holds the reference: the compiler fuses on its own.
        for variant in () if torch.compiler.is_compiling() else self.variants:
            if variant.when(*args, **kwargs):
                return variant.run(*args, **kwargs)
        return self.reference(*args, **kwargs)


class _Forgetful:
    """Stands in for an autograd context where no backward pass will come."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`, or its forward alone where nothing needs a gradient.

    A context outlives its call until the garbage collector comes, and with it all that it saved.
    """
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return function.apply(*args)
    return function.forward(_Forgetful(len(args)), *args)
