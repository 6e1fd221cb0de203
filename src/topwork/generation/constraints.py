"""Output that follows a JSON schema, a regular expression or a grammar.

The `llguidance` library (extra `constraints`) says which tokens may come next; a Constraint is
a processor like any other:

    generate(ids, logits_processor=[Constraint(tokenizer, regex=r"\\d+")])
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError, TopworkError
from topwork.generation.processors import NEVER


class Constraint:
    """Allows what leads to a text of the given kind, and the end token where it is complete.

    One of `json_schema` (a mapping, or its JSON), `regex` and `grammar` (in Lark's notation).
    ConfigError when it is not understood, or says tokens that the tokenizer does not have.
    A constraint follows one call of `generate`, or one request of the engine.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError(
                "constraints need the package llguidance: pip install 'topwork[constraints]'"
            ) from error
        if [json_schema, regex, grammar].count(None) != 2:
            raise ConfigError("a constraint is one of json_schema, regex and grammar")
        stop = tokenizer.eos_token_id
        if stop is None:
            raise ConfigError("a constraint needs a tokenizer with an end token")
        matcher = llguidance.LLMatcher
        if json_schema is not None:
            text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
            rule = matcher.grammar_from_json_schema(text)
        elif regex is not None:
            rule = matcher.grammar_from_regex(regex)
        else:
            rule = matcher.grammar_from_lark(str(grammar))
        known = llguidance.LLTokenizer(tokenizer.core.to_str(), vocab_size, stop)
        self._start = matcher(known, rule, log_level=0)
        if self._start.is_error():
            raise ConfigError(f"the constraint is not understood: {self._start.get_error()}")
        self._prompt: int | None = None
        self._states: dict[tuple[int, ...], Any] = {}

    def fresh(self) -> Constraint:
        """The same rule for another request."""
        twin = copy.copy(self)
        twin._prompt, twin._states = None, {}
        return twin

    def __call__(self, seen: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with what cannot follow `seen` [B, T] forbidden."""
        if self._prompt is None or seen.shape[1] < self._prompt:
            self._prompt = seen.shape[1]
        states: dict[tuple[int, ...], Any] = {}
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for row, ids in enumerate(seen[:, self._prompt :].tolist()):
            text = tuple(ids)
            if text not in states:
                states[text] = self._after(text)
            bits = torch.frombuffer(bytearray(states[text].compute_bitmask()), dtype=torch.uint8)
            mask = (bits[:, None] >> torch.arange(8) & 1).bool().flatten()[: scores.shape[1]]
            allowed[row, : len(mask)] = mask.to(scores.device)
        self._states = states
        return scores.masked_fill(~allowed, NEVER)

    def _after(self, text: tuple[int, ...]) -> Any:
        """The state after `text`: one step on from an earlier one, or from the start."""
        known = self._states.get(text[:-1]) if text else None
        state = (known or self._start).deep_copy()
        for token in text[-1:] if known is not None else text:
            # A row that has ended is padded: its state stays where it is.
            if not state.is_stopped() and not state.consume_token(token):
                raise TopworkError(f"token {token} breaks the constraint: {state.get_error()}")
        return state
