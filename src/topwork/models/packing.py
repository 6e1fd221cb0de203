"""Between padded rows and packed ones: no padding is ever computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.ops import Lengths


@dataclass(frozen=True)
class Padding:
    """Which cells of a padded batch are real: `keep` [B, T]; `lengths`, those of each row."""

    keep: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, attention_mask: Tensor) -> Self:
        """From a mask [B, T] of ones and zeros. ConfigError when nothing is real."""
        keep = attention_mask.bool()
        lengths = tuple(n for n in keep.sum(1).tolist() if n)
        if not lengths:
            raise ConfigError("attention_mask marks every token as padding")
        return cls(keep, lengths)

    def pack(self, rows: Tensor) -> Tensor:
        """The real cells of [B or 1, T, ...], one row after the other: [1, N, ...]."""
        return rows.expand(*self.keep.shape, *rows.shape[2:])[self.keep][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, N, C] → [B, T, C], zeros where there is padding."""
        rows = packed.new_zeros(*self.keep.shape, packed.shape[-1])
        return rows.masked_scatter(self.keep[..., None], packed[0])


def check_lengths(lengths: Lengths, batch: int, tokens: int) -> None:
    """ConfigError unless the documents fill the single row that they are packed in."""
    total = sum(sum(n) if isinstance(n, tuple) else n for n in lengths)
    if batch != 1 or total != tokens:
        raise ConfigError(
            f"lengths={lengths} must sum to the {tokens} tokens of a single row, got batch {batch}"
        )


def packed_positions(lengths: Lengths, device: torch.device) -> Tensor:
    """Each token's place in its own document, [1, N]; branches go on from their beginning."""
    pieces = []
    for entry in lengths:
        first, *branches = entry if isinstance(entry, tuple) else (entry,)
        pieces.append(torch.arange(first, device=device))
        pieces += [torch.arange(first, first + n, device=device) for n in branches]
    return torch.cat(pieces)[None]


def document_ends(lengths: Lengths, device: torch.device) -> Tensor:
    """The place of each document's last token in the row, a branch counting as a document: [N]."""
    at, ends = 0, []
    for entry in lengths:
        first, *branches = entry if isinstance(entry, tuple) else (0, entry)
        at += first
        for size in branches:
            at += size
            ends.append(at - 1)
    return torch.tensor(ends, device=device)
