"""Processors that need more than the scores: a second prompt, or the caller's own grammar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation.loop import Stepper
from topwork.generation.processors import NEVER, Processor


def guided(
    model: Any, scale: float, negative: Tensor | None, mask: Tensor | None, new: int
) -> Processor:
    """Classifier-free guidance (arXiv:2306.17806): u + scale · (c - u), in log-probabilities.

    u follows the `negative` prompt [B, N] (without one: the prompt's last id) over a cache of
    its own, c the real prompt.
    """
    if mask is not None:
        mask = torch.cat((mask, mask.new_ones(len(mask), new)), 1)
    step = Stepper(model, model.new_cache(), mask, None)

    def run(seen: Tensor, scores: Tensor) -> Tensor:
        ids = seen[:, -1:]
        if step.cache.length == 0 and negative is not None:
            if negative.dim() != 2 or len(negative) not in (1, len(seen)):
                raise ConfigError(
                    f"negative_prompt_ids {list(negative.shape)} do not match {len(seen)} rows"
                )
            ids = negative.expand(len(seen), -1)
        away = step(ids)[:, -1].log_softmax(-1)
        return away + scale * (scores.log_softmax(-1) - away)

    return run


def only_allowed(allowed: Callable[[int, Tensor], list[int]], beams: int) -> Processor:
    """Only the ids that `allowed(prompt index, ids [T])` lists."""

    def run(seen: Tensor, scores: Tensor) -> Tensor:
        barred = torch.ones_like(scores, dtype=torch.bool)
        for row, ids in enumerate(seen):
            ids_here = allowed(row // beams, ids)
            if not ids_here:
                raise ConfigError(
                    f"prefix_allowed_tokens_fn allows no token after {ids.tolist()[-5:]}"
                )
            barred[row, ids_here] = False
        return scores.masked_fill(barred, NEVER)

    return run
