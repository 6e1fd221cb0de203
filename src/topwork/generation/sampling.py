"""What is done to the next token's logits [B, V] before one is chosen. Plain functions, fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.generation.config import GenerationConfig


def penalise_repeats(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of the ids in `seen` [B, T]."""
    old = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(old < 0, old * penalty, old / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the `k` most likely (ties with the last of them stay)."""
    last = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < last, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches `p` (arXiv:1904.09751)."""
    ordered, index = logits.sort(descending=False)
    below = ordered.softmax(-1).cumsum(-1) <= 1 - p
    below[:, -1] = False
    return logits.masked_fill(below.scatter(1, index, below), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Those at least `p` times as likely as the most likely one (arXiv:2407.01082)."""
    chances = logits.softmax(-1)
    return logits.masked_fill(chances < p * chances.amax(-1, keepdim=True), float("-inf"))


def shape(logits: Tensor, seen: Tensor, made: int, config: GenerationConfig) -> Tensor:
    """All processors that are on, in the field's usual order."""
    if config.repetition_penalty != 1:
        logits = penalise_repeats(logits, seen, config.repetition_penalty)
    if made < config.min_new_tokens and config.stops:
        logits = logits.clone()
        logits[:, config.stops] = float("-inf")
    if not config.do_sample:
        return logits
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p:
        logits = keep_min_p(logits, config.min_p)
    return logits


def choose(logits: Tensor, config: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """One id per row [B]: drawn, or the most likely."""
    if not config.do_sample:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
