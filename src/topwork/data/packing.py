"""Putting samples together: packs of bounded length, and micro-batches as one flat row."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from topwork.data.prepare import Sample
from topwork.errors import ConfigError, nearest
from topwork.media.placed import Placer

STRATEGIES = ("bfd", "wrapped")


@dataclass(frozen=True)
class Batch:
    """Documents one after the other in a single row; no padding.

    `input_ids` [1, T] with their `lengths`, in which (P, n, m …) is a prompt of P tokens shared by
    answers of n, m … tokens; hidden state `positions` [N] predicts `targets` [N]; `rows` are the
    numbers of the rows inside, and `owners` [N] says which document (answers count one by one)
    each target belongs to. `images`: what the model takes besides for the images of all documents,
    by name; `tasks` [documents]: the numbers of their tasks, where all rows tell them.
    """

    input_ids: Tensor
    lengths: tuple[int | tuple[int, ...], ...]
    positions: Tensor
    targets: Tensor
    owners: Tensor
    rows: tuple[int, ...]
    images: Mapping[str, Tensor] = field(default_factory=dict)
    tasks: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> Batch:
        moved = (t.to(device) for t in (self.input_ids, self.positions, self.targets, self.owners))
        ids, positions, targets, owners = moved
        images = {name: tensor.to(device) for name, tensor in self.images.items()}
        tasks = None if self.tasks is None else self.tasks.to(device)
        return Batch(ids, self.lengths, positions, targets, owners, self.rows, images, tasks)


Pack = tuple[Sample, ...]


def pack(samples: Sequence[Sample], length: int, strategy: str = "bfd") -> list[Pack]:
    """Samples in packs of at most `length` tokens.

    "bfd": best fit decreasing, whole samples that do not see one another (arXiv:2404.10830);
    "wrapped": one stream cut every `length` tokens, whose pieces lose their beginnings.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"packing_strategy={strategy!r}{nearest(strategy, STRATEGIES)}; one of {STRATEGIES}"
        )
    if strategy == "wrapped" and any(s.images for s in samples):
        raise ConfigError(
            'packing_strategy="wrapped" cuts rows, and images with them: take "bfd" for rows with '
            "images"
        )
    return _wrapped(samples, length) if strategy == "wrapped" else _best_fit(samples, length)


def _best_fit(samples: Sequence[Sample], length: int) -> list[Pack]:
    packs: list[list[Sample]] = []
    room: list[tuple[int, int]] = []  # (tokens free, pack), sorted
    for sample in sorted(samples, key=lambda s: (-len(s), s.row)):
        at = bisect.bisect_left(room, (len(sample), -1))
        if at == len(room):
            packs.append([])
            free, home = length, len(packs) - 1
        else:
            free, home = room.pop(at)
        packs[home].append(sample)
        if free > len(sample):
            bisect.insort(room, (free - len(sample), home))
    return [tuple(sorted(p, key=lambda s: s.row)) for p in packs]


def _wrapped(samples: Sequence[Sample], length: int) -> list[Pack]:
    packs: list[list[Sample]] = [[]]
    free = length
    for sample in samples:
        at = 0
        while at < len(sample):
            if not free:
                packs.append([])
                free = length
            part = slice(at, at + free)
            ids, trained = sample.ids[part], sample.trained[part]
            packs[-1].append(Sample(sample.row, ids, trained, task=sample.task))
            taken = len(packs[-1][-1])
            at, free = at + taken, free - taken
    return [tuple(p) for p in packs if p]


def collate(samples: Sequence[Sample], placer: Placer | None = None) -> Batch:
    """One micro-batch. Samples of one length are made neighbours, which attention likes.

    `placer` reads the samples' images. DataError, naming the row, for one that cannot be read.
    """
    samples = sorted(samples, key=len, reverse=True)
    ids = torch.from_numpy(np.concatenate([s.ids for s in samples]).astype(np.int64))
    trained = np.concatenate([s.trained for s in samples])
    lengths = tuple(len(s) for s in samples)
    starts = np.cumsum((0, *lengths[:-1]))
    trained[starts] = False  # nothing stands before a document's first token
    wanted = np.flatnonzero(trained)
    owners = np.repeat(np.arange(len(samples)), lengths)[wanted]
    tasks = [s.task for s in samples]
    return Batch(
        ids[None],
        lengths,
        torch.from_numpy(wanted - 1),
        ids[torch.from_numpy(wanted)],
        torch.from_numpy(owners),
        tuple(dict.fromkeys(s.row for s in samples)),
        {} if placer is None else placer.tensors(samples),
        None if None in tasks else torch.tensor(tasks),
    )
