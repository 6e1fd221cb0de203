"""Spans hidden from a model in training: SpecAugment (arXiv:1904.08779)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.errors import ConfigError


@dataclass(frozen=True)
class Spans:
    """`share` of an axis (0 to 1) is hidden, in spans of `size`, at least `least` of them."""

    share: float
    size: int
    least: int = 0

    def draw(self, lengths: Sequence[int], width: int, axis: str) -> Tensor:
        """What is hidden, [rows, width] of bool: each row within its length.

        Spans may overlap; whether a part of a span counts as one is drawn for all rows together.
        """
        if not 0 < self.size <= width:
            raise ConfigError(
                f"mask_{axis}_length={self.size} does not fit the {width} places of the {axis} axis"
            )
        rounding = float(torch.rand(()))
        hidden = torch.zeros(len(lengths), width, dtype=torch.bool)
        within = torch.arange(self.size)
        for row, length in enumerate(lengths):
            count = max(int(self.share * length / self.size + rounding), self.least)
            room = length - self.size + 1  # places where a span may begin
            count = max(0, min(count, width // self.size, room))
            starts = torch.randperm(max(room, 0))[:count]
            hidden[row, (starts[:, None] + within).flatten()] = True
        return hidden


@dataclass(frozen=True)
class Augment:
    """What training hides along the axes of time and of features; None: nothing."""

    time: Spans | None
    features: Spans | None
