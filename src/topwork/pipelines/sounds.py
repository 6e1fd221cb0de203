"""What the pipelines of sounds share: reading, pieces of long sounds, batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topwork.errors import ConfigError, DataError
from topwork.media import LogMel, Waveform, read_audio
from topwork.pipelines.base import Pipeline

ROWS = 8  # sounds in one pass, where no batch size is given


@dataclass(frozen=True)
class Piece:
    """Samples of input `owner`; `stride`: (length, left, right) in samples, where it overlaps."""

    owner: int
    samples: np.ndarray
    stride: tuple[int, int, int] | None = None


class SoundPipeline(Pipeline):
    """Sounds in: paths, bytes, open files, arrays, {"raw" or "array", "sampling_rate"}."""

    takes = "sounds"
    feature_extractor: LogMel | Waveform

    def is_single(self, inputs: Any) -> bool:
        kinds = (str, bytes, bytearray, os.PathLike, Mapping)
        return isinstance(inputs, kinds) or hasattr(inputs, "shape") or hasattr(inputs, "read")

    @property
    def rate(self) -> int:
        return self.feature_extractor.sampling_rate

    def samples(self, items: Sequence[Any]) -> list[np.ndarray]:
        """Each input at the model's rate. DataError names the one that is no sound."""
        return [read_audio(item, self.rate, f"input {i}") for i, item in enumerate(items)]

    def features(self, sounds: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What the model reads of sounds that may go together, on its device."""
        options: dict[str, Any] = {"return_tensors": "pt", "return_attention_mask": True}
        if isinstance(self.feature_extractor, Waveform):
            options["padding"] = True
        made = self.feature_extractor(list(sounds), **options)
        base, name = self.base, self.feature_extractor.name
        found = {key: value.to(base.device) for key, value in made.items()}
        found[name] = found[name].to(base.dtype)
        return found

    def together(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of sounds that go into one pass and come out as they would alone.

        Spectrograms are of one length. Samples may be filled up where the convolutions norm by
        frame; where they norm over time, sounds of one length go together.
        """
        size = self.batch_size or ROWS
        same = isinstance(self.feature_extractor, Waveform)
        same = same and self.config.get("feat_extract_norm", "group") == "group"
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        group: list[int] = []
        for i in order:
            if group and (len(group) == size or (same and lengths[i] != lengths[group[0]])):
                yield group
                group = []
            group.append(i)
        if group:
            yield group


def pieces_of(
    owner: int, samples: np.ndarray, rate: int, length: float, stride: Any, align: int
) -> Iterator[Piece]:
    """`samples` in pieces of `length` seconds that overlap by `stride` (left, right) seconds.

    All counts are multiples of `align` samples, those of one frame of the model.
    """
    sides = (length / 6,) * 2 if stride is None else stride
    sides = (sides, sides) if isinstance(sides, (int, float)) else tuple(sides)
    if length <= 0 or len(sides) != 2 or min(sides) < 0:
        raise ConfigError(
            f"chunk_length_s={length} and stride_length_s={stride!r} must be positive seconds"
        )
    size, left, right = (round(s * rate / align) * align for s in (length, *sides))
    if size <= left + right:
        raise ConfigError(
            f"chunk_length_s={length} must be more than both sides of stride_length_s={stride!r}"
        )
    for begin in range(0, len(samples), size - left - right):
        piece = samples[begin : begin + size]
        last = begin + size >= len(samples)
        sides = (left if begin else 0, 0 if last else right)
        if len(piece) > sides[0]:
            yield Piece(owner, piece, (len(piece), *sides))
        if last:
            break


def own_stride(item: Any, samples: np.ndarray, rate: int, name: str) -> tuple[int, int, int] | None:
    """What a mapping says of its overlaps, in samples at `rate`."""
    if not isinstance(item, Mapping) or item.get("stride") is None:
        return None
    ratio = rate / item.get("sampling_rate", rate)
    left, right = (round(n * ratio) for n in item["stride"])
    if left + right > len(samples):
        raise DataError(f"{name}: stride={item['stride']} is longer than its sound")
    return len(samples), left, right


def with_mask(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a mask that hides nothing."""
    mask = found.get("attention_mask")
    if mask is not None and bool(torch.all(mask == 1)):
        return {k: v for k, v in found.items() if k != "attention_mask"}
    return found
