"""The key/value cache of a decoder."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, per layer [B, S, K, D]; grows by doubling."""

    def __init__(self, layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._filled = [0] * layers

    @property
    def length(self) -> int:
        """Tokens held (padding included)."""
        return self._filled[0] if self._filled else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, T, K, D] of `layer`; returns all of them, [B, S, K, D]."""
        start = self._filled[layer]
        stop = start + k.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None or keys.shape[1] < stop:
            room = max(64, 2 * stop)
            grown = [t.new_empty(t.shape[0], room, *t.shape[2:]) for t in (k, v)]
            if keys is not None and values is not None:
                grown[0][:, :start], grown[1][:, :start] = keys[:, :start], values[:, :start]
            keys, values = self._keys[layer], self._values[layer] = grown
        keys[:, start:stop], values[:, start:stop] = k, v
        self._filled[layer] = stop
        return keys[:, :stop], values[:, :stop]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self._filled = [min(filled, length) for filled in self._filled]

    def select(self, rows: Tensor) -> None:
        """Keep and order the batch rows by index (beam search, finished rows)."""
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    store[layer] = torch.index_select(tensor, 0, rows)
