"""Activation checkpointing (arXiv:1604.06174): the backward pass computes again what it needs.

As torch's own without reentry, but free of its compiler: that import costs 80 MB and a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
_CARRIED: list[ContextVar[Any]] = []


class Carried(Generic[T]):
    """A `ContextVar` whose value in the forward pass holds in the recomputation too. Graphs, which
    know of no context, read and set it as a plain attribute."""

    def __init__(self, name: str) -> None:
        self.variable: ContextVar[T | None] = ContextVar(name, default=None)
        self.traced: T | None = None
        _CARRIED.append(self.variable)

    def get(self) -> T | None:
        if torch.compiler.is_compiling():
            return self.traced
        found = self.variable.get()
        return self.traced if found is None else found

    def set(self, value: T) -> Any:
        """Returns what `reset` wants."""
        before, self.traced = self.traced, value
        return before, None if torch.compiler.is_compiling() else self.variable.set(value)

    def reset(self, token: Any) -> None:
        self.traced, inner = token
        if inner is not None:
            self.variable.reset(inner)

    @contextmanager
    def told_by(self, model: nn.Module, before: Callable[..., tuple[T, Any]]) -> Iterator[None]:
        """Within it each call of `model` is preceded by `before(module, args, call)`, which gives
        the value that the layers read and the call as it goes on."""
        tokens = []

        def hook(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            value, call = before(module, args, call)
            tokens.append(self.set(value))
            return args, call

        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for token in reversed(tokens):
                self.reset(token)


_REACHED: ContextVar[Callable[[list[Tensor]], None] | None] = ContextVar("reached", default=None)


def about_to_keep(*tensors: Tensor | None) -> None:
    """Said by a function that will keep these tensors and no result of what it computes next.

    Where they are the last that a recomputation is for, it ends here.
    """
    reached = _REACHED.get()
    if reached is not None:
        reached([tensor for tensor in tensors if tensor is not None])


def recomputed(run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)`, of which only the tensors among `args` are kept for the backward pass.

    It is run again there: with the same random numbers, carried variables and autocast, and up to
    the last tensor that the backward pass asks for. RuntimeError where it then keeps fewer.
    """
    if torch.compiler.is_compiling():
        return checkpoint(run, *args, use_reentrant=False)
    again = _Again(run, args)
    token = _REACHED.set(again.reached)
    try:
        with saved_tensors_hooks(again.keep, again.found):
            return run(*args)
    finally:
        _REACHED.reset(token)


class _Kept(torch.autograd.Function):
    """Tensors kept by a node of the graph, so that hooks around it see them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing is computed from the anchor")


class _EnoughError(Exception):
    """All that the backward pass asks for is there."""


class _Again:
    """One run: how many tensors it kept, and, once they are asked for, those tensors."""

    def __init__(self, run: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.run = run
        self.rest = [None if isinstance(a, Tensor) else a for a in args]
        self.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        self.graded = [args[i].requires_grad for i in self.places]
        anchor = torch.empty(0, requires_grad=True)
        self.node: Any = _Kept.apply(anchor, *(args[i] for i in self.places)).grad_fn
        self.world = _Surroundings([args[i].device for i in self.places])
        self.count = 0
        self.announced: list[int] = []  # how many were to be kept then, by each that told it
        self.held: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> int:
        self.count += 1
        return self.count - 1

    def reached(self, tensors: list[Tensor]) -> None:
        self.announced.append(self.count + len(tensors))

    def found(self, at: int) -> Tensor:
        if at not in self.held:
            self._compute()
        return self.held.pop(at)

    def _compute(self) -> None:
        seen: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            seen.append(tensor.detach())
            if len(seen) == self.count:
                raise _EnoughError
            return seen[-1]

        calls = 0

        def reached(tensors: list[Tensor]) -> None:
            nonlocal calls
            calls += 1
            last = calls == len(self.announced) and self.announced[-1] == self.count
            if last and len(seen) + len(tensors) == self.count:
                seen.extend(tensor.detach() for tensor in tensors)
                raise _EnoughError

        args = list(self.rest)
        for i, tensor, graded in zip(self.places, self.node.saved_tensors, self.graded):
            args[i] = tensor.detach().requires_grad_(graded)
        hooks = saved_tensors_hooks(note, lambda tensor: tensor)
        token = _REACHED.set(reached)
        try:
            with suppress(_EnoughError), self.world.restored(), torch.enable_grad(), hooks:
                self.run(*args)
        finally:
            _REACHED.reset(token)
        if len(seen) < self.count:
            raise RuntimeError(
                f"computed again, {getattr(self.run, '__qualname__', type(self.run).__name__)} "
                f"kept {len(seen)} tensors for the backward pass, and {self.count} before: it does "
                "not do the same each time, so it cannot be checkpointed"
            )
        self.held = dict(enumerate(seen))


class _Surroundings:
    """What a computation depends on besides its arguments."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cuda = sorted({d for d in devices if d.type == "cuda"}, key=str)
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = [torch.cuda.get_rng_state(d) for d in self.cuda]
        held = ((v, v.get(None)) for v in _CARRIED)
        self.variables = [(v, value) for v, value in held if value is not None]
        self.casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", *(d.type for d in self.cuda)}
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([d.index or 0 for d in self.cuda]))
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.cuda, self.cuda_states):
                torch.cuda.set_rng_state(state, device)
            for variable, value in self.variables:
                stack.callback(variable.reset, variable.set(value))
            for kind, dtype, enabled in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield
