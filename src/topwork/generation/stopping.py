"""When a row ends: criteria of one's own, and stop strings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation.streaming import HALF


class StoppingCriteria:
    """Base of criteria of one's own: called after each token with the ids [B, T] (and None), they
    say which rows end here, by a bool or [B]. A plain function serves as well."""

    def __call__(self, input_ids: Tensor, scores: Any = None, **more: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must say when a row ends: __call__")


class StoppingCriteriaList(list[Any]):
    """Several criteria; a row ends as soon as one of them says so."""

    def __call__(self, input_ids: Tensor, scores: Any = None, **more: Any) -> Tensor:
        ends = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            ends = ends | torch.as_tensor(criterion(input_ids, scores), device=ends.device)
        return ends


class LogitsProcessor:
    """Base of processors of one's own: ids [B, T] and scores [B, V] → scores [B, V]."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must give scores: __call__")


class LogitsProcessorList(list[Any]):
    """Several processors, one after the other."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class MaxLengthCriteria(StoppingCriteria):
    """Ends rows of `max_length` tokens, the prompt counted."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, input_ids: Tensor, scores: Any = None, **more: Any) -> Tensor:
        ends = input_ids.shape[1] >= self.max_length
        return torch.full((len(input_ids),), ends, device=input_ids.device)


class MaxTimeCriteria(StoppingCriteria):
    """Ends rows `max_time` seconds after it was made."""

    def __init__(self, max_time: float) -> None:
        self.end = time.monotonic() + max_time

    def __call__(self, input_ids: Tensor, scores: Any = None, **more: Any) -> Tensor:
        ends = time.monotonic() >= self.end
        return torch.full((len(input_ids),), ends, device=input_ids.device)


class StopStrings:
    """A stopping criterion: which rows have just completed one of `strings`.

    A string may begin and end inside tokens, and begin in the prompt. Only the last tokens are
    looked at: as many as the longest string has bytes, for each of them gives one at least.
    """

    def __init__(self, tokenizer: Any, strings: str | Sequence[str]) -> None:
        if tokenizer is None:
            raise ConfigError("stop_strings needs the tokenizer: generate(…, tokenizer=tokenizer)")
        self.tokenizer = tokenizer
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not self.strings or not all(isinstance(s, str) and s for s in self.strings):
            raise ConfigError(f"stop_strings={strings!r} must be texts, none of them empty")
        # A text that is decoded from inside a character, or from a blank, loses it: some more.
        self.window = max(len(s.encode()) for s in self.strings) + 4

    def __call__(self, ids: Tensor, scores: Any = None) -> Tensor:
        """Of rows `ids` [B, T], those that end here [B]."""
        rows = ids[:, -self.window :].tolist()
        return torch.tensor([self.ends(row) for row in rows], device=ids.device)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the last of `ids` completes a string."""
        tail = list(ids[-self.window :])
        after = self._text(tail)
        for _ in range(3):  # some decoders lose the characters behind half a one, too
            if after.startswith(HALF):
                tail = tail[1:]
                after = self._text(tail)
        if not any(string in after for string in self.strings):
            return False
        # How much of it is old. Half a character before may have hidden the whole ones around it.
        old = max(_agree(self._text(tail[:-back]), after) for back in range(1, 5))
        return any(after.find(s, max(0, old - len(s) + 1)) >= 0 for s in self.strings)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _agree(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
