"""Stop strings: a row ends with the token that completes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation.streaming import HALF


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
