"""A prompt with several answers: the prompt is computed once, each answer sees it and itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from topwork.data.packing import Batch
from topwork.data.prepare import Sample
from topwork.media.placed import Placed, Placer


@dataclass(frozen=True)
class Group:
    """`answers` (their `ids` without the prompt, `trained` marks) to the `prompt` of row `row`, in
    which `prompt_images` stand."""

    row: int
    prompt: np.ndarray
    answers: tuple[Sample, ...]
    prompt_images: tuple[Placed, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(a) for a in self.answers)

    @property
    def apart(self) -> int:
        """Tokens if every answer carried the prompt of its own."""
        return sum(len(self.prompt) + len(a) for a in self.answers)

    @property
    def trained(self) -> np.ndarray:
        """The marks of all its tokens, the prompt's and the answers' one after the other."""
        none = np.zeros(len(self.prompt), np.bool_)
        return np.concatenate([none, *(a.trained for a in self.answers)])

    @property
    def images(self) -> tuple[Placed, ...]:
        """All its images, at their places among these tokens."""
        found, at = list(self.prompt_images), len(self.prompt)
        for answer in self.answers:
            found += [shifted(image, at) for image in answer.images]
            at += len(answer)
        return tuple(found)


def shifted(image: Placed, by: int) -> Placed:
    """`image`, so many tokens further on."""
    return replace(image, start=image.start + by, stop=image.stop + by)


def collate_groups(groups: Sequence[Group], placer: Placer | None = None) -> Batch:
    """One micro-batch; `owners` counts the answers of all groups in order.

    `placer` reads the images. DataError, naming the row, for one that cannot be read.
    """
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
        {} if placer is None else placer.tensors(groups),
    )
