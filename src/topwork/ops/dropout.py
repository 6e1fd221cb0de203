"""Dropout that can be drawn again: the mask is a function of a seed, so none is saved."""

from __future__ import annotations

import torch
from torch import Tensor


def new_seed() -> int:
    """A fresh seed from torch's default generator (so that a resumed run draws the same)."""
    return int(torch.randint(0, 2**62, ()).item())


def drop(x: Tensor, rate: float, seed: int) -> Tensor:
    """`x` with elements zeroed with probability `rate` and the others scaled by 1/(1-rate).

    Sixteen random bits decide each element: four elements for each 64-bit draw, which on a CPU
    is several times faster than drawing a float for each.
    """
    generator = torch.Generator(device=x.device).manual_seed(seed)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    threshold = round(rate * 65536) - 32768
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= threshold
    return x * keep * (1.0 / (1.0 - rate))
