"""Which samples make up a step: a function of the step's number, so nothing has to be replayed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Sampler:
    """`size` samples in micro-batches of `micro`, `accumulation` of them a step on each of `world`
    devices. Each epoch has its own order, drawn from `seed` alone. `repeat`: so many steps in a row
    have the same samples.
    """

    size: int
    micro: int
    accumulation: int = 1
    seed: int = 42
    shuffle: bool = True
    rank: int = 0
    world: int = 1
    repeat: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return self.repeat * math.ceil(self.size / (self.micro * self.accumulation * self.world))

    def groups(self, step: int) -> list[list[int]]:
        """This device's micro-batches of `step` (from 0); an epoch's last step may be smaller."""
        epoch, place = divmod(step // self.repeat, self.steps_per_epoch // self.repeat)
        whole = self.micro * self.accumulation * self.world
        chosen = _order(self.size, epoch, self.seed, self.shuffle)[place * whole :][:whole]
        # Every device gets its part of each micro-batch, so that a short step is shared as well.
        pieces = [
            chosen[at : at + self.micro * self.world]
            for at in range(0, len(chosen), self.micro * self.world)
        ]
        return [
            piece[self.rank :: self.world] for piece in pieces if piece[self.rank :: self.world]
        ]


@lru_cache(maxsize=2)
def _order(size: int, epoch: int, seed: int, shuffle: bool) -> list[int]:
    if not shuffle:
        return list(range(size))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()
