"""aLoRA: from which token on an adapter acts. What is found in the ids reaches the layers here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.ops.recompute import Carried
from topwork.peft.parts import telling, told

NEVER = 2**62
"""The start of an adapter that does not act on a row."""


@dataclass(frozen=True)
class Invoked:
    """On which tokens adapters act that wait for their invocation: name → [B, T] bool. `keep`
    [B, T]: the real tokens, where a model may compute padded rows as one packed row."""

    on: dict[str, Tensor]
    keep: Tensor | None = None

    def laid(self, name: str, shape: torch.Size) -> Tensor:
        """The tokens of `name` as they lie in a layer's input of `shape`."""
        return laid(self.on[name], self.keep, shape)

    def part(self, shape: torch.Size, dim: int, index: Tensor) -> Invoked:
        return Invoked({n: self.laid(n, shape).index_select(dim, index.cpu()) for n in self.on})


def laid(said: Tensor, keep: Tensor | None, shape: torch.Size) -> Tensor:
    """What is `said` [B, T, ...] of tokens, as those lie in a layer's input of `shape`."""
    if shape[:2] == said.shape[:2]:
        return said
    if keep is not None and shape[0] == 1 and shape[1] == int(keep.sum()):
        return said[keep][None]
    if len(shape) == 2 and shape[0] == said.shape[0] * said.shape[1]:
        return said.flatten(0, 1)
    raise ConfigError(
        f"which of the {list(said.shape[:2])} tokens a layer's input {list(shape)} holds is not "
        "known"
    )


INVOKED: Carried[Invoked] = told(Carried("topwork.invoked"))


def invoked(name: str, y: Tensor) -> Tensor:
    """On which tokens of a layer's output `y` [..., out] the adapter acts, [...] bool."""
    state = INVOKED.get()
    if state is None:
        raise ConfigError(
            "aLoRA needs to see the tokens: call the PeftModel (or its backbone or generate), "
            "with input_ids"
        )
    return state.laid(name, y.shape).to(y.device)


class Invocations:
    """Where the adapters of a `PeftModel` that wait for tokens begin: `tokens` by adapter name.

    `starts` of a row: the column of its last invocation, NEVER without one.
    """

    def __init__(self, tokens: dict[str, list[int]]) -> None:
        self.tokens = tokens
        self.prompts: dict[str, Tensor] | None = None
        """Starts in whole prompts that are read in pieces."""

    def starts(self, ids: Tensor) -> dict[str, Tensor]:
        """name → [B] of `ids` [B, T]."""
        found = {}
        for name, wanted in self.tokens.items():
            size = len(wanted)
            last = torch.full((len(ids),), NEVER)
            if ids.shape[1] >= size:
                same = (ids.cpu().unfold(1, size, 1) == torch.tensor(wanted)).all(-1)
                places = torch.arange(1, same.shape[1] + 1) * same
                last = torch.where(same.any(1), places.max(1).values - 1, last)
            found[name] = last
        return found

    def seen(
        self, ids: Tensor | None, keep: Tensor | None, lengths: Any, past: int, cache: Any
    ) -> Invoked:
        """On which of the new `ids` [B, T], after `past` columns in `cache`, adapters act."""
        if ids is None:
            raise ConfigError(
                "aLoRA finds its invocation in input_ids; inputs_embeds do not show it"
            )
        columns = torch.arange(past, past + ids.shape[1])
        if lengths is not None:
            entries = [n if isinstance(n, tuple) else (n,) for n in lengths]
            parts = zip(ids[0].split([sum(entry) for entry in entries]), entries)
            found = [self._in_document(part.split(entry)) for part, entry in parts]
            return Invoked({n: torch.cat([masks[n] for masks in found])[None] for n in self.tokens})
        starts = self.prompts
        if starts is None:
            before = _HELD.get(cache, {}) if past and cache is not None else {}
            here = self.starts(ids)
            starts = {
                n: torch.where(s < NEVER, s + past, before.get(n, s)) for n, s in here.items()
            }
            if cache is not None:
                _HELD[cache] = starts
        wide = {n: s.repeat_interleave(len(ids) // len(s)) for n, s in starts.items()}
        real = keep.cpu().bool() if keep is not None and keep.shape == ids.shape else None
        return Invoked({n: columns >= s[:, None] for n, s in wide.items()}, real)

    def _in_document(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """name → where it acts, of a beginning and its branches. As in `generate`, a beginning that
        has an invocation is not asked again for what follows it."""
        begin, *branches = parts
        found = {}
        for name, start in self.starts(begin[None]).items():
            masks, at = [torch.arange(len(begin)) >= start], len(begin)
            for branch in branches:
                if start == NEVER:
                    own = self.starts(torch.cat((begin, branch))[None])[name]
                else:
                    own = start
                masks.append(torch.arange(at, at + len(branch)) >= own)
            found[name] = torch.cat(masks)
        return found

    @contextmanager
    def within(self, ids: Tensor | None, keep: Tensor | None, lengths: Any, cache: Any, past: int
               ) -> Iterator[None]:  # fmt: skip
        """Within it the layers know on which of the new `ids` adapters act."""
        with telling(INVOKED, self.seen(ids, keep, lengths, past, cache)):
            yield

    @contextmanager
    def hooked(self, model: Any) -> Iterator[None]:
        """Within it calls of `model`, of transformers, tell the layers."""
        if getattr(model, "is_gradient_checkpointing", False) and model.training:
            raise ConfigError(
                "aLoRA does not go with transformers' gradient checkpointing, which computes "
                "layers again without their tokens; Topwork's models checkpoint with it"
            )

        def before(module: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            ids = args[0] if args else call.get("input_ids")
            cache = call.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            keep = None if past else call.get("attention_mask")
            return self.seen(ids, keep, None, past, cache), call

        with INVOKED.told_by(model, before):
            yield


def invocations(configs: dict[str, Any]) -> Invocations | None:
    """Of the adapters in `configs`; None where none waits for tokens."""
    tokens = {n: getattr(c, "alora_invocation_tokens", None) for n, c in configs.items()}
    waiting = {name: list(ids) for name, ids in tokens.items() if ids}
    return Invocations(waiting) if waiting else None


_HELD: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()
