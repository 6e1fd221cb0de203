"""Embeddings of positions: learned, or sines and cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sines(count: int, size: int) -> Tensor:
    """[count, size]: sin(p / 10000^(2i/size)), then the cosines (arXiv:1706.03762)."""
    angles = torch.arange(count, dtype=torch.float64)[:, None]
    powers = torch.arange(0, size, 2, dtype=torch.float64) / size
    angles = angles / 10000.0**powers
    return torch.cat((angles.sin(), angles.cos()[:, : size // 2]), 1).float()


def fairseq_sines(count: int, size: int) -> Tensor:
    """[count, size] as fairseq spaces them: the slowest turns 1/10000 per position."""
    half = size // 2
    speeds = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(count).float()[:, None] * speeds
    table = torch.cat((angles.sin(), angles.cos()), 1)
    return torch.cat((table, table.new_zeros(count, size % 2)), 1)


class LearnedPlaces(nn.Embedding):
    """A learned row per position; the first is row `offset`."""

    def __init__(self, context: int, size: int, offset: int) -> None:
        super().__init__(context + offset, size)
        self.offset = offset

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + self.offset)


class StoredSines(nn.Module):
    """Sines that the checkpoint holds as a `weight`; `fairseq` spacing begins at the first row."""

    weight: Tensor

    def __init__(self, context: int, size: int, fairseq: bool = False) -> None:
        super().__init__()
        make = fairseq_sines if fairseq else sines
        self.register_buffer("weight", make(context, size))

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions]


class Sines(nn.Module):
    """Sines that no file holds; `fairseq` spacing begins at row `offset`."""

    def __init__(self, size: int, fairseq: bool = False, offset: int = 0) -> None:
        super().__init__()
        self.size, self.fairseq, self.offset = size, fairseq, offset
        self._table: Tensor | None = None

    def forward(self, positions: Tensor) -> Tensor:
        count = int(positions.max()) + self.offset + 1
        if self._table is None or len(self._table) < count:
            make = fairseq_sines if self.fairseq else sines
            self._table = make(max(512, 2 * count), self.size)
        if self._table.device != positions.device:
            self._table = self._table.to(positions.device)
        return self._table[positions + self.offset]
