"""A prompt with several answers: the prompt is computed once, each answer sees it and itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from topwork.data.packing import Batch
from topwork.data.prepare import Sample


@dataclass(frozen=True)
class Group:
    """`answers` (their `ids` without the prompt, `trained` marks) to the `prompt` of row `row`."""

    row: int
    prompt: np.ndarray
    answers: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(a) for a in self.answers)

    @property
    def apart(self) -> int:
        """Tokens if every answer carried the prompt of its own."""
        return sum(len(self.prompt) + len(a) for a in self.answers)


def collate_groups(groups: Sequence[Group]) -> Batch:
    """One micro-batch; `owners` counts the answers of all groups in order."""
    pieces, lengths, positions, places, owners = [], [], [], [], []
    at = answer = 0
    for group in groups:
        begin = len(group.prompt)
        pieces.append(group.prompt)
        sizes = [len(a) for a in group.answers]
        lengths.append((begin, *sizes) if len(sizes) > 1 else begin + sizes[0])
        last = at + begin - 1  # predicts the first token of every answer
        at += begin
        for sample in group.answers:
            pieces.append(sample.ids)
            wanted = np.flatnonzero(sample.trained)
            if not begin:
                wanted = wanted[wanted > 0]
            before = at + wanted - 1
            before[wanted == 0] = last
            positions.append(before)
            places.append(at + wanted)
            owners.append(np.full(len(wanted), answer))
            at, answer = at + len(sample), answer + 1
    ids = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
    where = torch.from_numpy(np.concatenate(places).astype(np.int64))
    return Batch(
        ids[None],
        tuple(lengths),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        ids[where],
        torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        tuple(dict.fromkeys(g.row for g in groups)),
    )
