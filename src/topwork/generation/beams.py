"""Beam search and beam sampling: the best of several continuations kept at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topwork import ops
from topwork.errors import ConfigError
from topwork.generation.loop import GenerateOutput, Task

LOW = -1.0e9  # below every score, yet finite


@dataclass
class Beams:
    """`n` hypotheses per prompt: ids [B, n, L], summed log-probabilities [B, n], and from which
    beam each token came [B, n, new]."""

    ids: Tensor
    scores: Tensor
    origin: Tensor
    done: Tensor

    def pick(self, index: Tensor) -> Beams:
        """Those at `index` [B, m]."""
        return Beams(*(_pick(t, index) for t in (self.ids, self.scores, self.origin, self.done)))

    def join(self, other: Beams) -> Beams:
        pairs = zip(vars(self).values(), vars(other).values())
        return Beams(*(torch.cat(pair, 1) for pair in pairs))


def _pick(tensor: Tensor, index: Tensor) -> Tensor:
    shape = (*index.shape, *tensor.shape[2:])
    return tensor.gather(1, index.view(*index.shape, *[1] * (tensor.dim() - 2)).expand(shape))


def search(task: Task) -> GenerateOutput:
    """The `num_return_sequences` best of each prompt; rows of `task.ids` are the prompts.

    The model runs on B · n rows, beam after beam of each prompt.
    """
    n, batch = task.config.num_beams, len(task.ids)
    if task.streamer is not None:
        raise ConfigError("a streamer cannot follow beams: their past changes; use num_beams=1")
    prompt = task.ids.shape[1]
    live, kept = _start(task)
    open_rows = torch.ones(batch, 1, dtype=torch.bool, device=task.ids.device)
    raw: list[Tensor] = []
    shaped: list[Tensor] = []
    at, new_ids = prompt, task.ids.repeat_interleave(n, 0)[:, task.step.cache.length :]
    padding = None if task.mask is None else task.mask.repeat_interleave(n, 0)[:, :prompt] == 0
    while at < prompt + task.new and not task.overdue:
        best = _best(task, live, new_ids, padding, at, (raw, shaped))
        at += 1
        ended = task.ended(best.ids[:, :, :at].flatten(0, 1)).view(batch, -1)
        ended = ended | (at == prompt + task.new) | task.overdue
        best.done = ended
        alive = best.scores + ended * LOW
        chosen = alive.topk(n).indices
        live = best.pick(chosen)
        live.scores = alive.gather(1, chosen)
        kept = _finish(task, kept, best, open_rows, at - prompt)
        open_rows = open_rows & _may_improve(task, live, kept, at - prompt)
        settled = bool(kept.done.all()) and task.config.early_stopping is True
        if not bool(open_rows.any()) or settled or bool(ended.all()):
            break
        rows = live.origin[:, :, at - prompt - 1].flatten().long()
        if not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            task.step.select(rows)
        new_ids = live.ids[:, :, at - 1].reshape(-1, 1)
    return _result(task, kept, prompt, raw, shaped)


def _start(task: Task) -> tuple[Beams, Beams]:
    """The running beams, of which only the first counts at first, and those that have ended."""
    n, (batch, length) = task.config.num_beams, task.ids.shape
    device = task.ids.device
    ids = task.ids.new_full((batch, n, length + task.new), task.config.filler)
    ids[:, :, :length] = task.ids[:, None]
    scores = torch.full((batch, n), LOW, device=device)
    origin = torch.full((batch, n, task.new), -1, device=device, dtype=torch.int32)
    done = torch.zeros(batch, n, dtype=torch.bool, device=device)
    live = Beams(ids, scores.clone(), origin, done)
    live.scores[:, 0] = 0
    return live, Beams(ids.clone(), scores, origin.clone(), done.clone())


def _best(
    task: Task, live: Beams, new_ids: Tensor, padding: Tensor | None, at: int,
    told: tuple[list[Tensor], list[Tensor]],
) -> Beams:  # fmt: skip
    """Continuations of `live` by the tokens that follow `new_ids`; `told` hears what they score."""
    if task.only_ids:
        return _extend(task, live, *task.step.likeliest(new_ids, _width(task)), at)
    logits = task.step(new_ids)[:, -1]
    said = live.ids[:, :, :at].flatten(0, 1)
    if padding is not None:
        said = said.clone()
        said[:, : padding.shape[1]].masked_fill_(padding, task.vocab)
    scores = task.score(said, logits.log_softmax(-1))
    if task.config.output_logits:
        told[0].append(logits.clone())
    if task.config.output_scores:
        told[1].append(scores.clone())
    if task.config.do_sample:
        return _drawn(task, live, scores, at)
    found = ops.likeliest(scores.contiguous(), _width(task), normalise=False)
    return _extend(task, live, *found, at)


def _count(task: Task) -> int:
    """How many continuations are enough that n go on even if the best ones all end."""
    return max(2, 1 + len(task.stops)) * task.config.num_beams


def _width(task: Task) -> int:
    """How many of one beam can be among them."""
    return min(_count(task), task.vocab)


def _extend(task: Task, live: Beams, scores: Tensor, tokens: Tensor, at: int) -> Beams:
    """The best continuations by the likeliest of each beam: scores and tokens [B n, m]."""
    n, batch, wide = task.config.num_beams, len(live.ids), scores.shape[1]
    total = (scores.view(batch, n, wide) + live.scores[:, :, None]).flatten(1)
    values, index = total.topk(_count(task))
    token = tokens.view(batch, -1).gather(1, index)
    return _continued(task, live, values, index // wide, token, at)


def _drawn(task: Task, live: Beams, scores: Tensor, at: int) -> Beams:
    """Continuations drawn by their scores [B n, V]."""
    n, batch, vocab = task.config.num_beams, len(live.ids), scores.shape[1]
    total = (scores.view(batch, n, vocab) + live.scores[:, :, None]).flatten(1)
    chances = total.softmax(-1)
    task.check(chances)
    index = torch.multinomial(chances, _count(task), generator=task.generator)
    return _continued(task, live, total.gather(1, index), index // vocab, index % vocab, at)


def _continued(
    task: Task, live: Beams, values: Tensor, beam: Tensor, token: Tensor, at: int
) -> Beams:
    """Those of `live` at `beam` [B, m], with one token more and these scores."""
    task.check(values)
    best = live.pick(beam)
    best.ids[:, :, at] = token
    offset = torch.arange(len(beam), device=beam.device)[:, None] * task.config.num_beams
    best.origin[:, :, at - task.ids.shape[1]] = (beam + offset).to(best.origin.dtype)
    best.scores = values
    return best


def _finish(task: Task, kept: Beams, best: Beams, open_rows: Tensor, made: int) -> Beams:
    """The n best that have ended, old and new. Only the first n of `best` may join."""
    n, config = task.config.num_beams, task.config
    joins = best.done.clone()
    joins[:, n:] = False
    closed = kept.done.all(1, keepdim=True) & (config.early_stopping is True)
    scores = best.scores / made**config.length_penalty
    for barred in (closed, ~open_rows, ~joins):
        scores = scores + barred * LOW
    both = kept.join(Beams(best.ids, scores, best.origin, joins))
    return both.pick(both.scores.topk(n).indices)


def _may_improve(task: Task, live: Beams, kept: Beams, made: int) -> Tensor:
    """Whether the best running beam could still beat the worst finished one [B, 1]."""
    penalty = task.config.length_penalty
    never = task.config.early_stopping == "never" and penalty > 0
    reach = live.scores[:, :1] / (task.new if never else made) ** penalty
    worst = torch.where(kept.done, kept.scores.amin(1, keepdim=True), LOW)
    return (reach > worst).any(1, keepdim=True)


def _result(
    task: Task, kept: Beams, prompt: int, raw: list[Tensor], shaped: list[Tensor]
) -> GenerateOutput:
    count = task.config.num_return_sequences
    ids, scores, origin = (t[:, :count].flatten(0, 1) for t in (kept.ids, kept.scores, kept.origin))
    made = int((origin >= 0).sum(1).max()) if origin.numel() else 0
    whole: dict[str, Any] = {
        "scores": tuple(shaped) if task.config.output_scores else None,
        "logits": tuple(raw) if task.config.output_logits else None,
    }
    return GenerateOutput(
        ids[:, : prompt + made].clone(),
        sequences_scores=scores,
        beam_indices=origin[:, :made],
        past_key_values=task.step.cache,
        **whole,
    )
