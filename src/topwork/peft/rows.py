"""Which adapter each row of a batch goes through."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.peft.parts import narrowed


def copies_of(model: Any, call: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one."""
    given = call.get("generation_config") or getattr(model, "generation_config", None)
    counts = (call.get(n) or getattr(given, n, None) for n in ("num_beams", "num_return_sequences"))
    return max(count or 1 for count in counts)


class Rows:
    """Which adapter each row of a batch goes through ("__base__": none)."""

    def __init__(
        self,
        names: list[str],
        call: Mapping[str, Any],
        members: Mapping[str, tuple[str, ...]],
        copies: int = 1,
    ) -> None:
        """Of a model's `call`. `members`: the adapters on layers that stand for a name, if others
        than itself. `copies`: rows that `generate` may make of one (beams, several answers)."""
        keep, lengths = call.get("attention_mask"), call.get("lengths")
        given = lengths or call.get("input_ids", names)
        if len(names) != len(given):
            raise ConfigError(f"adapter_names has {len(names)} entries for {len(given)} rows")
        self.names = names
        self._members = members
        self._distinct = list(dict.fromkeys(names))
        self._of_row = torch.arange(len(names))
        self._copies = copies
        # A model may compute a padded batch as one packed row: then each token has its adapter.
        self._of_token: Tensor | None = None
        if keep is not None:
            self._of_token = keep.bool().cpu().nonzero()[:, 0]
        elif lengths is not None:
            self._of_token = torch.repeat_interleave(self._of_row, torch.tensor(lengths))

    def members(self, name: str) -> tuple[str, ...]:
        """The adapters on layers that stand for `name`."""
        return self._members.get(name, (name,))

    def through(self, held: Container[str]) -> list[tuple[str, ...]]:
        """The different sets of adapters that rows go through at a layer that has `held`."""
        names = (self.members(name) for name in self._distinct)
        return list(dict.fromkeys(tuple(n for n in part if n in held) for part in names))

    def _packed(self, x: Tensor) -> bool:
        tokens = self._of_token
        return tokens is not None and x.shape[0] == 1 and x.shape[1:2] == tokens.shape

    def dim_of(self, x: Tensor) -> int:
        """The dimension of `x` along which adapters differ."""
        return 1 if self._packed(x) else 0

    def of(self, x: Tensor) -> dict[str, Tensor]:
        """Adapter name → the indices of `x`, along `dim_of(x)`, that go through it."""
        rows = self._of_row
        if self._packed(x):
            assert self._of_token is not None
            rows = self._of_token
        elif self._copies > 1 and x.shape[0] == len(self.names) * self._copies:
            rows = rows.repeat_interleave(self._copies)
        elif x.shape[0] != len(self.names):
            raise ConfigError(
                f"adapter_names has {len(self.names)} entries, but a layer got {x.shape[0]} rows"
            )
        found: dict[str, list[int]] = {}
        for at, row in enumerate(rows.tolist()):
            found.setdefault(self.names[row], []).append(at)
        return {name: torch.tensor(at, device=x.device) for name, at in found.items()}

    def apply(self, x: Tensor, of: Callable[[str], Callable[[Tensor], Tensor]]) -> Tensor:
        """`x` with the rows of each adapter through what `of` gives for its name."""
        dim, parts, order = self.dim_of(x), [], []
        for name, index in self.of(x).items():
            with narrowed(x.shape, dim, index):
                parts.append(of(name)(x.index_select(dim, index)))
            order.append(index)
        return torch.cat(parts, dim).index_select(dim, torch.cat(order).argsort())
