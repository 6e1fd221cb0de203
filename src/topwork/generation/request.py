"""One request of the engine: its prompt, its options, its pages, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.errors import ConfigError, TopworkError
from topwork.generation import draw
from topwork.generation.config import GenerationConfig
from topwork.generation.loop import Criterion
from topwork.generation.processors import NEVER, Processor, apply, processors
from topwork.nn.paged import PagePool

ACTIVE = "__active__"


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
        adapter: str | None,
        vocab: int,
        extra: Sequence[Processor] = (),
        criteria: Sequence[Criterion] = (),
        top_logprobs: int | None = None,
    ) -> None:
        self.prompt = prompt
        self.config = config
        self.new = new
        self.adapter = adapter
        self.ids = list(prompt)
        self.logprobs: list[float] = []
        self.top_logprobs = top_logprobs
        self.told: list[Told] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.pages: list[int] = []
        self.held = 0  # tokens whose keys and values lie in the pages
        self.generator = draw.stream(config.seed)
        length = len(prompt)
        self.processors = processors(
            draw.uncut(config), vocab, length, length + new, extra=extra
        )  # fmt: skip
        self._stops = frozenset(config.stops)
        self._criteria = criteria
        self._names: list[int] = []  # of the full pages
        self._prompt_pages = 0
        self._named = 0
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

    # -- for the engine --------------------------------------------------------------------------

    @property
    def made(self) -> int:
        return len(self.ids) - len(self.prompt)

    @property
    def overdue(self) -> bool:
        limit = self.config.max_time
        return limit is not None and time.monotonic() - self._started > limit

    def next_count(self, piece: int) -> int:
        """Tokens of the next piece: they end at multiples of `piece`, whoever else is there."""
        return min(len(self.ids), self.held // piece * piece + piece) - self.held

    def pages_for(self, tokens: int, size: int) -> int:
        """How many more pages `tokens` tokens need."""
        return max(0, -(-tokens // size) - len(self.pages))

    def names_of_prompt(self, pool: PagePool) -> list[int]:
        """A name for each full page before the prompt's last id."""
        size = pool.size
        while (len(self._names) + 1) * size <= len(self.ids):
            end = (len(self._names) + 1) * size
            before = self._names[-1] if self._names else self.adapter
            self._names.append(pool.name_for(before, tuple(self.ids[end - size : end])))
        self._prompt_pages = (len(self.prompt) - 1) // size
        return self._names[: self._prompt_pages]

    def promised(self) -> list[int]:
        """Names of pages of the prompt that are still to be written."""
        return self._names[self._named : self._prompt_pages]

    def start(self, pool: PagePool) -> bool:
        """Take over pages that hold the beginning already; False when pages are too scarce."""
        self.names_of_prompt(pool)
        for name in self._names[: (len(self.ids) - 1) // pool.size]:
            page = pool.find(name)
            if page is None:
                break
            self.pages.append(page)
        self.held = len(self.pages) * pool.size
        self._named = len(self.pages)
        if self.pages_for(len(self.ids) + 1, pool.size) > pool.spare:
            self.stop(pool)
            return False
        return True

    def name_pages(self, pool: PagePool) -> None:
        """Let others find the pages that have become full."""
        full = self.held // pool.size
        self.names_of_prompt(pool)
        for i in range(self._named, min(full, len(self._names))):
            pool.name(self.pages[i], self._names[i])
        self._named = max(self._named, min(full, len(self._names)))

    def stop(self, pool: PagePool) -> None:
        """Give the pages back; what was made stays, so that it could go on later."""
        pool.release(self.pages)
        self.pages, self.held, self._named = [], 0, 0

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
