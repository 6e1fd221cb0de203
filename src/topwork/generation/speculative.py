"""Guessing ahead: cheap guesses, checked by the model many at a time (arXiv:2211.17192).

The model draws its own token at every guessed place, in order and from the same generator, and
the guesses count only as far as they agree. So what comes out is what plain decoding gives, greedy
or drawn, up to the rounding of a pass over several tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation.loop import GenerateOutput, Stepper, Task

Guess = Callable[[Tensor, int], Tensor]
"""(ids [T], how many at most) → guessed ids [n], n ≥ 0."""


def lookup(longest: int, stops: Tensor) -> Guess:
    """Guess what followed the last time that the final n-gram stood in the text."""

    def guess(ids: Tensor, count: int) -> Tensor:
        for n in range(min(longest, len(ids) - 1), 0, -1):
            grams = ids.unfold(0, n, 1)[:-1]
            hits = (grams == ids[-n:]).all(1).nonzero()[:, 0]
            # The first occurrence has the most text after it.
            for start in (hits[:1] + n).tolist():
                found = ids[start : start + count]
                cut = torch.isin(found, stops).nonzero()[:, 0]
                found = found[: int(cut[0])] if len(cut) else found
                if len(found):
                    return found
        return ids[:0]

    return guess


def assistant(model: Any, main: Any) -> Guess:
    """Guess greedily with a smaller model of the same vocabulary, over its own cache."""
    mine, theirs = model.config.vocab_size, main.config.vocab_size
    if mine != theirs:
        raise ConfigError(
            f"assistant_model has a vocabulary of {mine}, the model one of {theirs}; "
            "they must share their tokenizer"
        )
    step = Stepper(model, model.new_cache(), None, None)

    def guess(ids: Tensor, count: int) -> Tensor:
        made = ids
        # What was guessed wrongly last time stands in the cache behind what is true.
        step.cache.crop(min(step.cache.length, _same(seen[0], ids), len(ids) - 1))
        for _ in range(count):
            logits = step(made[None, step.cache.length :])[0, -1]
            made = torch.cat((made, logits.argmax(-1, keepdim=True)))
        seen[0] = made[: step.cache.length]
        return made[len(ids) :]

    seen = [torch.empty(0, dtype=torch.long)]
    return guess


def _same(a: Tensor, b: Tensor) -> int:
    """How many leading ids are equal."""
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n].to(a.device)).nonzero()
    return int(differ[0]) if len(differ) else n


def decode(task: Task, guess: Guess, count: int) -> GenerateOutput:
    """Decode one row, asking `guess` for up to `count` tokens before each pass."""
    if len(task.ids) != 1 or task.mask is not None:
        raise ConfigError("guessing ahead works on one row without padding")
    out, _ = task.room()
    at, length = task.ids.shape[1], out.shape[1]
    raw: list[Tensor] = []
    shaped: list[Tensor] = []
    if task.streamer is not None:
        task.streamer.put(task.ids)
    over = at >= length
    while not over and not task.overdue:
        guessed = guess(out[0, :at], min(count, length - at - 1))
        out[0, at : at + len(guessed)] = guessed
        held = task.step.cache.length
        logits = task.step(out[:, held : at + len(guessed)], last=len(guessed) + 1)
        right = 0
        for i in range(len(guessed) + 1):
            scores = task.score(out[:, :at], logits[:, i])
            chosen = task.choose(scores)
            if task.config.output_logits:
                raw.append(logits[:, i])
            if task.config.output_scores:
                shaped.append(task.told(out[:, :at], scores))
            agrees = i < len(guessed) and bool(out[0, at] == chosen)
            out[:, at] = chosen
            at += 1
            if task.streamer is not None:
                task.streamer.put(chosen)
            over = at >= length or bool(task.ended(out[:, :at]).any())
            if over or not agrees:
                break
            right += 1
        task.step.cache.crop(at - 1)
        if task.config.num_assistant_tokens_schedule == "heuristic" and len(guessed):
            count = count + 2 if right == len(guessed) else max(1, count - 1)
    if task.streamer is not None:
        task.streamer.end()
    return GenerateOutput(
        out[:, :at].clone(),
        tuple(shaped) if task.config.output_scores else None,
        tuple(raw) if task.config.output_logits else None,
        past_key_values=task.step.cache,
    )
