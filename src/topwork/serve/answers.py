"""One answer in the making: its text as it comes, and what the protocol tells of its tokens."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from topwork.generation import Event, Request, TextStreamer
from topwork.generation.streaming import HALF
from topwork.serve.asked import Asked
from topwork.text import Tokenizer
from topwork.text.calls import read_calls

REASONS = {"stop": "stop", "length": "length", "time": "length"}


class Text(TextStreamer):
    """The text of tokens as they come, up to a stop string and never the beginning of one."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], skip_special: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens=skip_special)
        self.stops = stops
        self.whole, self.out, self.stopped = "", 0, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.whole += text

    def push(self, token: int) -> str:
        """The text that is certain after one token more."""
        self.put(torch.tensor([token]))
        return self._certain(last=False)

    def finish(self) -> str:
        """What was held back."""
        self.end()
        return self._certain(last=True)

    def _certain(self, last: bool) -> str:
        if self.stopped:
            return ""
        ends = [at for at in (self.whole.find(stop, self._from(stop)) for stop in self.stops)
                if at >= 0]  # fmt: skip
        self.stopped = bool(ends)
        held = 0 if last else max((self._begun(stop) for stop in self.stops), default=0)
        end = min(ends) if ends else len(self.whole) - held
        new, self.out = self.whole[self.out : end], max(self.out, end)
        return new

    def _from(self, stop: str) -> int:
        return max(0, self.out - len(stop) + 1)

    def _begun(self, stop: str) -> int:
        """How much of `stop` the text ends with."""
        longest = min(len(stop) - 1, len(self.whole))
        return next((n for n in range(longest, 0, -1) if self.whole.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Part:
    """What one token brought: text, and its place among the answer's tokens (None: no token)."""

    text: str
    at: int | None
    finish: str | None = None


@dataclass
class Answer:
    """One of the answers of a request."""

    index: int
    request: Request
    events: AsyncIterator[Event]
    asked: Asked
    tokenizer: Tokenizer
    processed: bool
    """Tell the log-probabilities of the draws, after penalties and cuts; else the model's own."""
    text: Text = field(init=False)
    finish: str = "stop"

    def __post_init__(self) -> None:
        self.text = Text(self.tokenizer, self.asked.stops, self.asked.skip_special)

    async def parts(self) -> AsyncIterator[Part]:
        """The answer piece by piece; the last one says why it ended."""
        made = 0
        async for event in self.events:
            new = ""
            if event.token is not None:
                ends = event.done and event.token in self.request.config.stops
                hidden = ends and self.asked.skip_special
                new = "" if hidden else self.text.push(event.token)
                made += 1
            at = None if event.token is None else made - 1
            if event.done:
                self.finish = REASONS.get(self.request.finish_reason or "", "stop")
                yield Part(new + self.text.finish(), at, self.finish)
            else:
                yield Part(new, at)

    @property
    def ids(self) -> list[int]:
        return self.request.new_ids

    # -- log-probabilities -----------------------------------------------------------------------

    def name(self, token: int) -> str:
        if self.asked.as_ids:
            return f"token_id:{token}"
        text = self.tokenizer.decode([token])
        return self.tokenizer.convert_ids_to_tokens(token) if HALF in text else text

    def logprob(self, at: int) -> float:
        if self.processed and self.request.logprobs:
            return self.request.logprobs[at]
        return self.request.told[at].logprob

    def chat_logprobs(self, places: range) -> dict[str, Any] | None:
        """As chat completions tell them."""
        if self.asked.logprobs is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            name = self.name(token)
            return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

        return {"content": [
            {
                **entry(self.ids[i], self.logprob(i)),
                "top_logprobs": [entry(*one) for one in self.request.told[i].top],
            }
            for i in places
        ]}  # fmt: skip

    def text_logprobs(self, places: range) -> dict[str, Any] | None:
        """As completions tell them."""
        if self.asked.logprobs is None:
            return None
        names = [self.name(self.ids[i]) for i in places]
        offsets = [0]
        for name in names[:-1]:
            offsets.append(offsets[-1] + len(name))
        return {
            "tokens": names,
            "token_logprobs": [self.logprob(i) for i in places],
            "top_logprobs": [
                {self.name(token): value for token, value in self.request.told[i].top}
                for i in places
            ],
            "text_offset": offsets,
        }

    # -- the whole -------------------------------------------------------------------------------

    def message(self, text: str) -> dict[str, Any]:
        """The assistant's message; calls of tools are told apart where tools were given."""
        content, calls = read_calls(text) if self.asked.tools else (text, [])
        if not calls or any(call.error for call in calls):
            return {"role": "assistant", "content": text}
        self.finish = "tool_calls"
        return {
            "role": "assistant",
            "content": content or None,
            "tool_calls": [
                {
                    "id": f"call_{secrets.token_hex(8)}",
                    "type": "function",
                    "function": {"name": c.name, "arguments": json.dumps(c.arguments)},
                }
                for c in calls
            ],
        }
