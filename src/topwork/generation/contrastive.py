"""Contrastive search (arXiv:2202.06417): likely, yet unlike what was said before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation.loop import GenerateOutput, Task


def search(task: Task) -> GenerateOutput:
    """Of the `top_k` likeliest tokens, the one with the largest

    (1 - α) · probability - α · (largest cosine between its hidden state and the earlier ones).

    The candidates run as rows of one batch over copies of the cache.
    """
    if task.step.cache.length:
        raise ConfigError("contrastive search needs the whole prompt: pass no past_key_values")
    k, alpha = task.config.top_k, task.config.penalty_alpha or 0.0
    out, said = task.room()
    batch, at = task.ids.shape
    step, model = task.step, task.step.model
    hidden = step.hidden(task.ids)
    logits = model.head(hidden[:, -1]).float()
    past = F.normalize(hidden.float(), dim=-1)  # [B, S, C]
    real = torch.ones(batch, at, dtype=torch.bool, device=out.device)
    if task.mask is not None:
        real = task.mask[:, :at].bool()
    done = torch.zeros(batch, dtype=torch.bool, device=out.device)
    raw: list[Tensor] = []
    shaped: list[Tensor] = []
    if task.streamer is not None:
        task.streamer.put(task.ids)
    every = torch.arange(batch, device=out.device)
    whole_mask = step.mask
    while at < out.shape[1] and not task.overdue:
        scores = task.score(said[:, :at], logits)
        raw.append(logits)
        shaped.append(scores)
        chances, tokens = scores.softmax(-1).topk(min(k, task.vocab))  # [B, k]
        task.check(chances)
        width = tokens.shape[1]
        step.select(every.repeat_interleave(width))
        step.mask = None if whole_mask is None else whole_mask.repeat_interleave(width, 0)
        states = step.hidden(tokens.reshape(-1, 1))[:, -1]  # [B k, C]
        unit = F.normalize(states.float(), dim=-1).view(batch, width, -1)
        alike = (unit @ past.transpose(1, 2)).masked_fill(~real[:, None], -1.0).amax(-1)
        best = ((1 - alpha) * chances - alpha * alike).argmax(-1)  # [B]
        rows = every * width + best
        step.select(rows)
        chosen = tokens.gather(1, best[:, None])[:, 0].masked_fill(done, task.config.filler)
        past = torch.cat((past, unit[every, best][:, None]), 1)
        real = F.pad(real, (0, 1), value=True)
        logits = model.head(states[rows]).float()
        out[:, at] = said[:, at] = chosen
        at += 1
        if task.streamer is not None:
            task.streamer.put(chosen)
        done |= task.ended(out[:, :at])
        if bool(done.all()):
            break
    if task.streamer is not None:
        task.streamer.end()
    return GenerateOutput(
        out[:, :at].clone(),
        tuple(shaped) if task.config.output_scores else None,
        tuple(raw) if task.config.output_logits else None,
        past_key_values=step.cache,
    )
