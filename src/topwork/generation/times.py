"""Time tokens between texts: when they may come, and the parts that they cut (Whisper)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.generation.processors import NEVER, Processor

STEP = 0.02  # seconds between two time tokens
FRAME = 0.01  # seconds of one frame of the spectrogram


def time_rules(begin: int, stop: int, first: int, latest_start: int | None) -> Processor:
    """A processor that lets times come in pairs and in order (arXiv:2212.04356, 3.8).

    `begin`: the first place that is made, `stop` the end token, `first` the id of 0.00 (the id
    below it forbids times), `latest_start`: the latest time that may come first.
    """

    def run(seen: Tensor, scores: Tensor) -> Tensor:
        said, vocab = seen[:, begin:], scores.shape[1]
        ids = torch.arange(vocab, device=scores.device)
        times = said >= first
        none = torch.zeros(len(said), 1, dtype=torch.bool, device=scores.device)
        last = times[:, -1:] if said.shape[1] else none
        before = times[:, -2:-1] if said.shape[1] > 1 else ~none
        barred = (ids == first - 1) | (last & before & (ids >= first))
        barred = barred | (last & ~before & (ids < stop))
        if said.shape[1]:
            places = torch.arange(said.shape[1], device=scores.device)
            at = (places * times).argmax(1, keepdim=True)
            newest = said.gather(1, at) + (~(last & ~before)).long()
            newest = torch.where(times.any(1, keepdim=True), newest, first)
            barred = barred | ((ids >= first) & (ids < newest))
        else:
            barred = barred | (ids < first)
            if latest_start is not None:
                barred = barred | (ids > first + latest_start)
        scores = scores.masked_fill(barred, NEVER)
        logs = scores.float().log_softmax(-1)
        likelier = logs[:, first:].logsumexp(-1) > logs[:, :first].amax(-1)
        return scores.masked_fill(likelier[:, None] & (ids < first), NEVER)

    return run


@dataclass
class Segment:
    """A part of a transcription: seconds of its beginning and end, its ids with their times.

    `token_timestamps`: the second at which each id ends, where that was asked for.
    """

    start: float
    end: float
    tokens: list[int]
    token_timestamps: list[float] | None = None


def cut(
    tokens: list[int], first: int, offset: float, frames: int, stride: int,
    moments: list[float] | None,
) -> tuple[list[Segment], int]:  # fmt: skip
    """The parts of one window's `tokens`, and by how many frames to go on.

    `offset`: seconds before the window; `frames`: how many of it are sound; `moments`: each
    token's second within the window. Two times in a row end a part; what comes behind the last
    pair is said again in the next window, which begins there.
    """
    is_time = [t >= first for t in tokens]
    pairs = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]

    def part(begin: int, stop: int, start: float, end: float) -> Segment:
        own = None if moments is None else [m + offset for m in moments[begin:stop]]
        return Segment(offset + start, offset + end, tokens[begin:stop], own)

    if not pairs:
        end = int(frames * FRAME / STEP)
        places = [i for i, t in enumerate(is_time) if t]
        if places and tokens[places[-1]] != first:
            end = tokens[places[-1]] - first
        return [part(0, len(tokens), 0.0, end * STEP)], frames
    single = is_time[-2:] == [False, True]
    if single:
        pairs.append(len(tokens))
    else:
        pairs[-1] += 1  # the second time of the pair tells that the part was whole
    parts, begin = [], 0
    for stop in pairs:
        last = -2 if stop == pairs[-1] and not single else -1
        piece = tokens[begin:stop]
        parts.append(part(begin, stop, (piece[0] - first) * STEP, (piece[last] - first) * STEP))
        begin = stop
    return parts, frames if single else (tokens[begin - 2] - first) * stride
