"""One request of the engine: its prompt, its options, its pages, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.errors import ConfigError, TopworkError
from topwork.generation import draw
from topwork.generation.chain import Chain
from topwork.generation.config import GenerationConfig
from topwork.generation.loop import Criterion
from topwork.generation.processors import NEVER, Processor, apply, processors
from topwork.generation.runner import Piece
from topwork.nn.paged import PagePool
from topwork.peft.acting import Acting

ACTIVE = "__active__"
VIRTUAL = -1
"""What stands in a text for a virtual token."""


@dataclass(frozen=True)
class Told:
    """What the model said of a token that was made, before penalties and cuts: its log-probability
    and the likeliest ids with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """A new token of `request`; None when the request ended without one. `done`: it is the last.

    (The request itself may be further on by the time that the event is read.)
    """

    request: Request
    token: int | None
    done: bool


class Request:
    """What `Engine.submit` returns. `ids` is the prompt and what was made so far; `logprobs` has,
    for each token made by drawing, the log-probability with which it was drawn; `told`, where
    `top_logprobs` were asked for, what the model itself said of each.

    `finish_reason`: None while it runs, then "stop", "length", "time", "cancelled" or "error"
    (then `error` says which).
    """

    def __init__(
        self,
        prompt: list[int],
        config: GenerationConfig,
        new: int,
        acting: Acting,
        vocab: int,
        extra: Sequence[Processor] = (),
        criteria: Sequence[Criterion] = (),
        top_logprobs: int | None = None,
    ) -> None:
        self.prompt = prompt
        self.config = config
        self.new = new
        self.acting = acting
        self.ids = list(prompt)
        self.text = [VIRTUAL] * acting.lead + self.ids  # what is cached
        self.logprobs: list[float] = []
        self.top_logprobs = top_logprobs
        self.told: list[Told] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        of = None if acting.adapter is None else acting
        self._chain = Chain(acting.own, of)
        self._bare = Chain(0, (of, "bare")) if acting.twice else None  # of the first pass
        self.held = 0  # tokens of the text whose keys and values lie in the pages
        self.generator = draw.stream(config.seed)
        length = len(prompt)
        self.processors = processors(
            draw.uncut(config), vocab, length, length + new, extra=extra
        )  # fmt: skip
        self._stops = frozenset(config.stops)
        self._criteria = criteria
        self._started = time.monotonic()
        self._said: Tensor | None = None  # log-probabilities [V] of the next token

    # -- for the caller --------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def new_ids(self) -> list[int]:
        """What was made, the stop token included."""
        return self.ids[len(self.prompt) :]

    def cancel(self) -> None:
        """End it at the next step; its pages become free."""
        self.cancelled = True

    @property
    def adapter(self) -> str | None:
        return self.acting.adapter

    # -- for the engine --------------------------------------------------------------------------

    @property
    def pages(self) -> list[int]:
        return self._chain.pages

    @property
    def _chains(self) -> list[Chain]:
        return [self._chain] if self._bare is None else [self._chain, self._bare]

    @property
    def made(self) -> int:
        return len(self.ids) - len(self.prompt)

    @property
    def overdue(self) -> bool:
        limit = self.config.max_time
        return limit is not None and time.monotonic() - self._started > limit

    def next_count(self, piece: int) -> int:
        """Tokens of the next piece: it ends at a multiple of `piece`, or with the virtual ones."""
        stop = min(len(self.text), self.held // piece * piece + piece)
        return (min(stop, self.acting.lead) if self.held < self.acting.lead else stop) - self.held

    def piece(self, count: int) -> Piece:
        """The next `count` tokens."""
        new = self.text[self.held : self.held + count]
        bare = [] if self._bare is None else self._bare.pages
        return Piece(new, self.held, self.pages, self.acting, bare)

    def pages_for(self, tokens: int, size: int) -> int:
        """How many more pages `tokens` tokens need."""
        return sum(max(0, -(-tokens // size) - len(chain.pages)) for chain in self._chains)

    def grow(self, tokens: int, pool: PagePool) -> None:
        """Take the pages that `tokens` tokens need."""
        for chain in self._chains:
            chain.pages += pool.take(max(0, -(-tokens // pool.size) - len(chain.pages)))

    def names_of_prompt(self, pool: PagePool) -> list[int]:
        """A name for each full page before the prompt's last id."""
        return self._chain.names(self.text, pool)[: self._prompt_pages(pool)]

    def _prompt_pages(self, pool: PagePool) -> int:
        return (self.acting.lead + len(self.prompt) - 1) // pool.size

    def promised(self, pool: PagePool) -> list[int]:
        """Names of pages of the prompt that are still to be written."""
        return self._chain.promised(self._prompt_pages(pool))

    def start(self, pool: PagePool) -> bool:
        """Take over pages that hold the beginning already; False when pages are too scarce."""
        for chain in self._chains:
            chain.find(self.text, pool)
        found = min(len(chain.pages) for chain in self._chains)
        for chain in self._chains:
            chain.keep(found, pool)
        self.held = found * pool.size
        if self.pages_for(len(self.text) + 1, pool.size) > pool.spare:
            self.stop(pool)
            return False
        return True

    def name_pages(self, pool: PagePool) -> None:
        """Let others find the pages that have become full."""
        for chain in self._chains:
            chain.name(self.held, self.text, pool)

    def stop(self, pool: PagePool) -> None:
        """Give the pages back; what was made stays, so that it could go on later."""
        for chain in self._chains:
            chain.keep(0, pool)
        self.held = 0

    @property
    def takes_best(self) -> bool:
        """Whether its next token is that of the largest logit."""
        plain = not self.config.do_sample and self.top_logprobs is None
        return plain and not self.processors

    def shaped(self, logits: Tensor) -> Tensor:
        """Scores [1, V] from logits [1, V]."""
        if self.top_logprobs is not None:
            self._said = logits[0].log_softmax(-1)
        if not self.processors:
            return logits
        scores = apply(self.processors, torch.tensor([self.ids]), logits)
        if scores.shape != logits.shape:
            raise ConfigError(f"a logits processor made {list(scores.shape)} of [1, V] scores")
        if not float(scores.max()) > NEVER:
            raise TopworkError("the logits processors leave no token that could follow")
        return scores.float()

    def choose(self, scores: Tensor) -> tuple[int, float | None]:
        """The next token, and its log-probability if it is drawn."""
        if not self.config.do_sample:
            return int(scores.argmax(-1)), None
        found = draw.choose(scores, self.config, [self.generator])
        return int(found.ids), float(found.logprobs)

    def give(self, token: int, logprob: float | None = None) -> str | None:
        """Append a token; the reason when the request ends with it."""
        self.ids.append(token)
        self.text.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self._said is not None:
            best = self._said.topk(self.top_logprobs or 0)
            top = tuple(zip(best.indices.tolist(), best.values.tolist()))
            self.told.append(Told(float(self._said[token]), top))
            self._said = None
        if token in self._stops:
            return "stop"
        if self._criteria:
            ids = torch.tensor([self.ids])
            if any(bool(torch.as_tensor(met(ids, None)).all()) for met in self._criteria):
                return "stop"
        return "length" if self.made >= self.new else None
