"""Drawing ahead: a thread writes the answers of the next rounds, under weights that are a bounded
number of rounds old, while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from topwork.objectives.rollouts import Answer, EngineWriter, Prompt, Writer

Play = Callable[[Writer, Sequence[Prompt], int, torch.Generator], list[list[Answer]]]
"""(writer, prompts, round, generator) → the answers to each prompt."""


def snapshot(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares what is frozen, and has trained tensors of its own."""
    shared: Any = {id(p): p for p in model.parameters() if not p.requires_grad}
    shared |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


@dataclass
class SnapshotWriter:
    """The engine over a copy of the model, so that a thread may write while the model is trained.
    New weights are taken up between two calls of `write`."""

    inner: EngineWriter
    model: nn.Module | None = None
    newest: dict[str, Tensor] = field(default_factory=dict)

    def follow(self, model: Any, step: int) -> None:
        if self.model is None:
            self.model = snapshot(model)
        self.newest = {n: p.detach().clone() for n, p in model.named_parameters()
                       if p.requires_grad}  # fmt: skip

    @torch.no_grad()
    def write(
        self, model: Any, texts: Sequence[Sequence[int]], limits: Sequence[int], seeds: list[int]
    ) -> list[Answer]:
        assert self.model is not None
        for name, tensor in self.newest.items():
            self.model.get_parameter(name).copy_(tensor)
        return self.inner.write(self.model, texts, limits, seeds)


@dataclass
class Ahead:
    """Rounds `depth` ahead, each drawn under the newest weights when its turn came.

    `upcoming`: the prompts of a round, None behind the last one. An answer is at most `depth`
    rounds old when it is used. What the thread holds is not part of a checkpoint: a resumed run
    draws it again.
    """

    writer: Writer
    depth: int
    play: Play = lambda writer, prompts, number, generator: []
    upcoming: Callable[[int], Sequence[Prompt] | None] = lambda number: None
    step: int = 0
    jobs: dict[int, Future[tuple[int, list[list[Answer]]]]] = field(default_factory=dict)
    pool: ThreadPoolExecutor | None = None

    def take(self, model: Any, number: int, step: int) -> tuple[int, list[list[Answer]]]:
        """The answers of round `number`, and how many optimiser steps their weights are old."""
        self.writer.follow(model, step)
        self.step = step
        self.pool = self.pool or ThreadPoolExecutor(1, "topwork-rollouts")
        for ahead in range(number, number + self.depth + 1):
            if ahead in self.jobs:
                continue
            prompts = self.upcoming(ahead)
            if prompts is None:
                break
            seed = int(torch.randint(2**62, (1,)))
            self.jobs[ahead] = self.pool.submit(self._draw, prompts, ahead, seed)
        drawn_at, answers = self.jobs.pop(number).result()
        return step - drawn_at, answers

    def _draw(self, prompts: Sequence[Prompt], number: int, seed: int) -> Any:
        drawn_at = self.step
        generator = torch.Generator().manual_seed(seed)
        return drawn_at, self.play(self.writer, prompts, number, generator)

    def stop(self) -> None:
        """Drop what was drawn ahead."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.jobs, self.pool = {}, None
