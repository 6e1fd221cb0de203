"""When each token is said, told by the decoder's attention to the sound (Whisper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation.times import STEP
from topwork.models.seq2seq import as_memory
from topwork.models.stack import Memory


def moments_of(
    model: Any, memory: Memory, row: int, ids: Tensor, given: int, speech: Mapping[str, Any],
    frames: int,
) -> list[float]:  # fmt: skip
    """The second within the window at which each made token of `ids` [T] ends.

    `given`: how many ids stood before the text; `frames` of the spectrogram are sound.
    """
    heads = speech.get("alignment_heads")
    if not heads:
        raise ConfigError(
            "times of words need alignment_heads, which generation_config.json does not name"
        )
    last = len(ids) - 1
    if last <= given:
        return [0.0] * (len(ids) - given)
    whole = as_memory(Memory(memory.hidden[row : row + 1]), None)
    weights = model.attention_to_memory(whole, ids[None, :last], heads)[:, given:, : frames // 2]
    spread = weights.std(1, keepdim=True, unbiased=False)
    weights = (weights - weights.mean(1, keepdim=True)) / spread
    width = model.config.get("median_filter_width", 7)
    costs = -median(weights, width).mean(0).double().cpu().numpy()
    tokens, times = warp(costs)
    jumps = np.pad(np.diff(tokens), (1, 0), constant_values=1).astype(bool)
    seconds = (times[jumps] * STEP).tolist()
    return [*seconds, seconds[-1]]


def median(x: Tensor, width: int) -> Tensor:
    """The median of `width` neighbours along the last axis [..., N], mirrored at the ends."""
    if width < 1 or width % 2 == 0:
        raise ConfigError(f"median_filter_width={width} must be odd")
    side = width // 2
    if x.shape[-1] <= side:
        return x
    mirrored = F.pad(x, (side, side, 0, 0), mode="reflect")
    return mirrored.unfold(-1, width, 1).sort().values[..., side]


def warp(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path through `costs` [tokens, times], as both indices (dynamic time warping)."""
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf, dtype=np.float32)
    came = np.full((rows + 1, columns + 1), 2, dtype=np.int8)  # 0 both, 1 token, 2 time
    total[0, 0] = 0
    came[1:, 0] = 1
    for j in range(1, columns + 1):
        for i in range(1, rows + 1):
            both, token, time = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            if both < token and both < time:
                best, step = both, 0
            elif token < both and token < time:
                best, step = token, 1
            else:
                best, step = time, 2
            total[i, j] = costs[i - 1, j - 1] + best
            came[i, j] = step
    i, j = rows, columns
    path = []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        step = came[i, j]
        i, j = i - (step != 2), j - (step != 1)
    tokens, times = np.array(path[::-1]).T
    return tokens, times
