"""Choosing the next token of many independent rows, each with its own options and generator.

A row's token depends on its own scores, options and generator alone, never on its company: so
`generate` and the engine draw the same from the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.generation.config import GenerationConfig
from topwork.generation.processors import NEVER


class Drawn(NamedTuple):
    """`ids` [N] and the log-probability [N] with which each was drawn, all cuts counted."""

    ids: Tensor
    logprobs: Tensor


PLAIN_CUTS = frozenset({"temperature", "top_k", "top_p", "min_p"})


def is_plain(config: GenerationConfig) -> bool:
    """Whether at most temperature, top-k, top-p and min-p shape the scores."""
    c = config
    return not (
        c.top_h is not None or c.typical_p < 1 or c.epsilon_cutoff or c.eta_cutoff
        or c.renormalize_logits
    )  # fmt: skip


def stream(seed: int | None, row: int = 0) -> torch.Generator:
    """Where the draws of one row come from: row `row` of a call with `seed` draws as a request with
    seed + row. Without a seed, from one that torch's default generator gives.
    """
    if seed is None:
        return torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
    return torch.Generator().manual_seed((seed + row) % 2**63)


def uncut(config: GenerationConfig) -> GenerationConfig:
    """What is left for processors to do before `draw`, which makes plain cuts for many rows."""
    if not (config.do_sample and is_plain(config)):
        return config
    return replace(config, do_sample=False, num_return_sequences=1)


def choose(
    scores: Tensor, config: GenerationConfig, generators: Sequence[torch.Generator]
) -> Drawn:
    """One id per row of scores [N, V] after the processors of `uncut(config)`."""
    if is_plain(config):
        return draw(scores, [config] * len(scores), generators)
    return _lookup(scores, None, generators)


def draw(
    scores: Tensor, configs: Sequence[GenerationConfig], generators: Sequence[torch.Generator]
) -> Drawn:
    """One id per row of scores [N, V] for configurations of which `is_plain` holds.

    Rows are grouped by the width they need, so that even ties fall as they would alone.
    """
    vocab = scores.shape[1]
    groups: dict[int | None, list[int]] = {}
    for row, c in enumerate(configs):
        whole = not c.top_k and c.top_p == 1 and not c.min_p
        width = None if whole else min(c.top_k or vocab, vocab)
        groups.setdefault(width, []).append(row)
    found = torch.empty(len(configs), dtype=torch.long, device=scores.device)
    chances = torch.empty(len(configs), device=scores.device)
    for width, rows in groups.items():
        picked = scores if len(rows) == len(configs) else scores[rows]
        found[rows], chances[rows] = _draw(
            picked, width, [configs[r] for r in rows], [generators[r] for r in rows]
        )
    return Drawn(found, chances)


def _draw(
    scores: Tensor,
    width: int | None,
    configs: Sequence[GenerationConfig],
    generators: Sequence[torch.Generator],
) -> Drawn:
    """The cuts are made among the best `width` only, in descending order; None: there are none."""
    heat, top_p, min_p = torch.tensor(
        [(c.temperature, c.top_p, c.min_p or 0.0) for c in configs], device=scores.device
    ).T[:, :, None]
    if width is None:
        return _lookup(scores / heat, None, generators)
    values, ids = scores.topk(width)
    values = values / heat
    chances = values.softmax(-1)
    before = chances.cumsum(-1) - chances
    keep = (before < top_p) & (chances >= min_p * chances[:, :1])
    keep[:, 0] = True
    return _lookup(values.masked_fill(~keep, NEVER), ids, generators)


def _lookup(values: Tensor, ids: Tensor | None, generators: Sequence[torch.Generator]) -> Drawn:
    """One uniform number per row, looked up in the cumulated chances."""
    chances = values.softmax(-1)
    reached = chances.cumsum(-1)
    point = torch.stack([torch.rand(1, generator=g) for g in generators])
    point = point.to(values.device) * reached[:, -1:]
    # The first place that is above the point, and has a chance at all.
    place = torch.searchsorted(reached, point, right=True)
    last = (values > NEVER).long().cumsum(-1).argmax(-1, keepdim=True)
    place = torch.minimum(place, last)
    found = place if ids is None else ids.gather(1, place)
    return Drawn(found[:, 0], chances.gather(1, place)[:, 0].log())
