"""The decoding loop: one pass over the prompt, then one token at a time with the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from topwork import ops
from topwork.errors import ConfigError, TopworkError
from topwork.generation import draw
from topwork.generation.config import GenerationConfig
from topwork.generation.crossed import CompiledStep
from topwork.generation.processors import Processor, apply
from topwork.generation.program import CachedProgram
from topwork.models.output import Output
from topwork.models.seq2seq import DecoderView


class Streamer(Protocol):
    """Receives the prompt, then each step's ids [B], then `end`."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


Criterion = Callable[[Tensor, Any], Any]
"""(ids [B, T], scores or None) → which rows end here: a bool or [B]."""


@dataclass
class GenerateOutput(Output):
    """What `return_dict_in_generate=True` gives."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    """Per step, what was chosen from [B, V]: the logits after all processors."""
    logits: tuple[Tensor, ...] | None = None
    """Per step, as they came from the model."""
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None
    past_key_values: Any = None


class Stepper:
    """The model over its cache: new ids in, the logits of what follows out.

    `mask` [B, all the tokens there will be], where rows are padded; `room`: how many that is. A
    native program makes the steps where there is one for the model.
    """

    def __init__(
        self, model: Any, cache: Any, mask: Tensor | None, chunk: int | None, room: int = 0
    ) -> None:
        self.model = model
        self.cache = cache
        self.mask = mask
        self.chunk = chunk
        self.room = room
        self._program: CachedProgram | CompiledStep | None = None
        self._asked = room == 0
        self._turn: int | None = getattr(model, "turning_point", None)
        self._seen: Tensor | None = None  # the ids in the cache, where they may be needed again
        self._beyond = False  # whether the cached keys have the angles of long texts

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, C] of `ids` [B, T] that follow what the cache holds."""
        at = self.cache.length
        mask = None if self.mask is None else self.mask[:, : at + ids.shape[1]]
        return self.model.backbone(ids, attention_mask=mask, cache=self.cache)

    def select(self, rows: Tensor) -> None:
        """Keep, order or repeat the rows by index."""
        self.cache.select(rows)
        if self._seen is not None:
            self._seen = self._seen[rows]

    def _again(self, ids: Tensor) -> Tensor:
        """`ids`, or all ids once more where they lead across the model's turning point: the angles
        of all positions change there, those of the cached keys too."""
        held, turn = self.cache.length, self._turn or 0
        before = ids[:, :0] if self._seen is None else self._seen[:, :held]
        self._seen = torch.cat((before, ids), 1)
        beyond, self._beyond = self._beyond, held + ids.shape[1] > turn
        if not held or beyond is self._beyond:
            return ids
        if before.shape[1] != held:
            raise ConfigError(
                f"a given cache cannot be gone on with beyond {turn} tokens: the model's angles "
                "change there. Pass the whole prompt"
            )
        self.cache.crop(0)
        return self._seen

    def __call__(self, ids: Tensor, last: int = 1) -> Tensor:
        """Logits [B, last, V] fp32 after the last `last` of `ids`."""
        if self._turn is not None:
            short = self._turn - self.cache.length
            if self.cache.length and 0 < short < ids.shape[1]:
                parts = [
                    self(part, min(last, part.shape[1]))
                    for part in (ids[:, :short], ids[:, short:])
                ]
                return torch.cat(parts, 1)[:, -last:]
            ids = self._again(ids)
        logits = self._natively(ids, last)
        if logits is not None:
            return logits.to(torch.float32, copy=True)  # the program's own are overwritten
        size = self.chunk or ids.shape[1]
        pieces = [self.hidden(piece) for piece in ids.split(size, 1)]
        hidden = pieces[-1] if last <= pieces[-1].shape[1] else torch.cat(pieces, 1)
        return self.model.head(hidden[:, -last:]).float()

    def greedy(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """The largest logits after `ids` [B, T]: their values [B] and ids [B]. None where they must
        be looked for in what the call itself gives.
        """
        program = None if self._turn is not None else self._native(ids, 1)
        if isinstance(program, CompiledStep):
            return program.greedy(ids)
        if program is None:
            return None
        self._natively(ids, 1)
        return program.best

    def likeliest(self, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The log-probabilities [B, count] of the likeliest after `ids` [B, T], and their ids."""
        logits = None if self._turn is not None else self._natively(ids, 1)
        logits = self(ids) if logits is None else logits
        return ops.likeliest(logits[:, -1].float(), count)

    def _native(self, ids: Tensor, last: int) -> CachedProgram | CompiledStep | None:
        """What reads `ids` natively, if they can be read so."""
        if not self._asked:
            self._asked = True
            if isinstance(self.model, DecoderView):
                self._program = CompiledStep.of(self.model, self.cache, self.room)
            else:
                self._program = CachedProgram.of(
                    self.model, self.cache, self.mask, len(ids), self.room
                )
        program = self._program
        return program if program is not None and program.takes(ids, last) else None

    def _natively(self, ids: Tensor, last: int) -> Tensor | None:
        program = self._native(ids, last)
        if program is None:
            return None
        pieces = ids.split(max(last, program.rows // len(ids)), 1)
        if len(pieces) == 1:
            return program.step(ids, last)
        found = [program.step(piece, min(last, piece.shape[1])).clone() for piece in pieces]
        return found[-1] if found[-1].shape[1] == last else torch.cat(found, 1)[:, -last:]


@dataclass
class Task:
    """One call of `generate`, checked and made ready."""

    config: GenerationConfig
    step: Stepper
    ids: Tensor  # [B, T], padded on the left where `mask` is 0
    mask: Tensor | None
    new: int
    vocab: int
    processors: Sequence[Processor] = ()
    cuts: Sequence[Processor] = ()  # what is made for many rows at once when a token is drawn
    criteria: Sequence[Criterion] = ()
    streamer: Streamer | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        device = self.ids.device
        self.stops = torch.tensor(self.config.stops, device=device, dtype=torch.long)
        self.generator: torch.Generator | None = None  # of beams, which are drawn all at once
        if self.config.seed is not None:
            self.generator = torch.Generator(device=device).manual_seed(self.config.seed)
        alone = self.config.do_sample and self.config.num_beams == 1
        self._streams = [draw.stream(self.config.seed, i) for i in range(len(self.ids) * alone)]

    @property
    def overdue(self) -> bool:
        limit = self.config.max_time
        return limit is not None and time.monotonic() - self.started > limit

    def room(self) -> tuple[Tensor, Tensor]:
        """Two buffers [B, T + new]: the ids, and the same with padding as V (what was said)."""
        length = self.ids.shape[1]
        out = self.ids.new_full((len(self.ids), length + self.new), self.config.filler)
        out[:, :length] = self.ids
        if self.mask is None:
            return out, out
        said = out.clone()
        said[:, :length].masked_fill_(self.mask[:, :length] == 0, self.vocab)
        return out, said

    def score(self, said: Tensor, logits: Tensor) -> Tensor:
        """Scores [B, V] from logits [B, V] after the ids `said` [B, T]."""
        return apply(self.processors, said, logits)

    def told(self, said: Tensor, scores: Tensor) -> Tensor:
        """The scores to give back, with the cuts that are left to the drawing."""
        return apply(self.cuts, said, scores).clone()

    @property
    def only_ids(self) -> bool:
        """Whether the ids of the largest logits are all that is wanted."""
        c = self.config
        return not (c.do_sample or self.processors or c.output_logits or c.output_scores)

    def choose(self, scores: Tensor) -> Tensor:
        """One id per row [B]: drawn, or the most likely."""
        best = scores.max(-1)
        self.check(best.values)
        if not self.config.do_sample:
            return best.indices
        return draw.choose(scores, self.config, self._streams).ids

    def check(self, values: Tensor) -> None:
        """TopworkError when a value (a maximum or a sum, which hand it on) is NaN."""
        if bool(values.isnan().any()):
            place = self.step.cache.length
            raise TopworkError(
                f"the logits are not numbers at token {place}: the weights are damaged"
            )

    def ended(self, ids: Tensor) -> Tensor:
        """Which rows of `ids` [B, T] end with their last id [B]."""
        done = torch.isin(ids[:, -1], self.stops)
        for criterion in self.criteria:
            found = criterion(ids, None)
            done = done | torch.as_tensor(found, device=ids.device)
        return done


def decode(task: Task) -> GenerateOutput:
    """Greedy, or drawn."""
    batch, at = task.ids.shape
    out, said = task.room()
    done = torch.zeros(batch, dtype=torch.bool, device=out.device)
    ends = bool(len(task.stops)) or bool(task.criteria)
    raw: list[Tensor] = []
    shaped: list[Tensor] = []
    new_ids = task.ids[:, task.step.cache.length :]
    if task.streamer is not None:
        task.streamer.put(task.ids)
    while at < out.shape[1] and not task.overdue:
        best = task.step.greedy(new_ids) if task.only_ids else None
        if best is None:
            logits = task.step(new_ids)[:, -1]
            scores = task.score(said[:, :at], logits)
            if task.config.output_logits:
                raw.append(logits.clone())
            if task.config.output_scores:
                shaped.append(task.told(said[:, :at], scores))
            chosen = task.choose(scores)
        else:
            task.check(best[0])
            chosen = best[1]
        if ends:
            chosen = chosen.masked_fill(done, task.config.filler)
        out[:, at] = said[:, at] = chosen
        at += 1
        if task.streamer is not None:
            task.streamer.put(chosen)
        if ends:
            done |= task.ended(out[:, :at])
            if bool(done.all()):
                break
        new_ids = chosen[:, None]
    if task.streamer is not None:
        task.streamer.end()
    return GenerateOutput(
        out[:, :at].clone(),
        tuple(shaped) if task.config.output_scores else None,
        tuple(raw) if task.config.output_logits else None,
        past_key_values=task.step.cache,
    )
