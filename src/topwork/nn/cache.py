"""The key/value cache of a decoder: one store per layer, of the kind that the layer needs.

Letters: B batch, T new tokens, S tokens held, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """Keys and values of one layer."""

    @property
    def length(self) -> int:
        """Tokens seen, padding included, be they still held or not."""
        ...

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, T, K, D]; returns those that the new tokens may look at, [B, S, K, D]."""
        ...

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on; ValueError when that cannot be."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep, order or repeat the batch rows by index."""
        ...


class Growing:
    """Every token, in one buffer that doubles; with `room` it is allocated once and never grows."""

    def __init__(self, room: int | None = None) -> None:
        self.length = 0
        self.room = room
        self._least = 64
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """All the room for keys and values, [B, room, K, D], where room is a multiple of 16.

        In memory the tokens of one head lie side by side: [B, K, room, D].
        """
        return self._held

    def reserve(self, room: int) -> None:
        """Let there be room for so many tokens without growing again."""
        self._least = max(self._least, room)
        if self._held is not None and self._held[0].shape[1] < room:
            self._held = self._grown(*self._held, room)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = self.length, self.length + k.shape[1]
        held = self._held
        if self.room is not None and stop > self.room:
            raise ValueError(f"a static cache of {self.room} tokens cannot hold {stop}")
        if held is None or held[0].shape[1] < stop:
            held = self._held = self._grown(k, v, stop)
        keys, values = held
        keys[:, start:stop], values[:, start:stop] = k, v
        self.length = stop
        return keys[:, :stop], values[:, :stop]

    def _grown(self, k: Tensor, v: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        room = self.room or (self._least if stop <= self._least else 2 * stop)
        room = -(-room // 16) * 16
        grown = _by_heads(k, room), _by_heads(v, room)
        if self._held is not None:
            for new, old in zip(grown, self._held):
                new[:, : self.length] = old[:, : self.length]
        return grown

    def crop(self, length: int) -> None:
        self.length = _cropped(self.length, length)

    def select(self, rows: Tensor) -> None:
        if self._held is None:
            return
        for tensor in self._held:  # in place where the batch keeps its size: nothing is allocated
            if len(rows) == len(tensor):
                tensor[:, : self.length] = tensor[rows, : self.length]
        if len(rows) != len(self._held[0]):
            keys, values = (t.transpose(1, 2).index_select(0, rows) for t in self._held)
            self._held = keys.transpose(1, 2), values.transpose(1, 2)


def _by_heads(like: Tensor, room: int) -> Tensor:
    """An empty [B, room, K, D], in memory [B, K, room, D], for what is like [B, T, K, D]."""
    batch, _, heads, size = like.shape
    return like.new_empty(batch, heads, room, size).transpose(1, 2)


class Windowed:
    """The last `window` tokens, of which a new one sees `window` with itself."""

    def __init__(self, window: int) -> None:
        self.length = 0
        self.window = window
        self._held: tuple[Tensor, Tensor] | None = None
        self._first = self._last = 0  # the part of the buffer that is in use

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new = k.shape[1]
        self.length += new
        if self._held is None or self._last + new > self._held[0].shape[1]:
            self._move(k, v)
        else:
            for tensor, value in zip(self._held, (k, v)):
                tensor[:, self._last : self._last + new] = value
            self._last += new
        assert self._held is not None
        first = max(self._first, self._last - new - (self.window - 1))
        keys, values = (t[:, first : self._last] for t in self._held)
        self._first = max(self._first, self._last - (self.window - 1))
        if new > self.window:  # a long prompt: keep only its end
            self._held = keys[:, -self.window :].clone(), values[:, -self.window :].clone()
            self._first, self._last = 1, self.window
        return keys, values

    def _move(self, k: Tensor, v: Tensor) -> None:
        """A buffer with what is in sight at its front, then k, v, and room for a window more."""
        kept = min(self._last - self._first, self.window - 1) if self._held is not None else 0
        stop = kept + k.shape[1]
        moved = []
        for i, value in enumerate((k, v)):
            shape = (len(value), max(stop, 2 * self.window), *value.shape[2:])
            buffer = value.new_empty(shape)
            if self._held is not None and kept:
                buffer[:, :kept] = self._held[i][:, self._last - kept : self._last]
            buffer[:, kept:stop] = value
            moved.append(buffer)
        self._held = moved[0], moved[1]
        self._first, self._last = 0, stop

    def crop(self, length: int) -> None:
        gone = self.length - _cropped(self.length, length)
        last = self._last - gone if length else 0
        if last < min(length, self.window - 1):
            raise ValueError(
                f"cannot crop a sliding window of {self.window} tokens from {self.length} to "
                f"{length}: the tokens before are gone"
            )
        self.length, self._last = length, last
        self._first = max(0, last - (self.window - 1))

    def select(self, rows: Tensor) -> None:
        if self._held is not None:
            keys, values = (t.index_select(0, rows) for t in self._held)
            self._held = keys, values


class Quantised:
    """Every token as int8, with one scale per token and head; dequantised when it is read."""

    def __init__(self) -> None:
        self._keys = (Growing(), Growing())
        self._values = (Growing(), Growing())

    @property
    def length(self) -> int:
        return self._keys[0].length

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._append(self._keys, k), self._append(self._values, v)

    @staticmethod
    def _append(stores: tuple[Growing, Growing], new: Tensor) -> Tensor:
        scale = new.float().abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
        whole = (new / scale).round().to(torch.int8)
        codes, _ = stores[0].update(whole, whole[..., :0])
        scales, _ = stores[1].update(scale, scale[..., :0])
        return (codes * scales).to(new.dtype)

    def crop(self, length: int) -> None:
        for store in (*self._keys, *self._values):
            store.crop(length)

    def select(self, rows: Tensor) -> None:
        for store in (*self._keys, *self._values):
            store.select(rows)


def _cropped(held: int, length: int) -> int:
    if not 0 <= length <= held:
        raise ValueError(f"cannot crop a cache of {held} tokens to {length}")
    return length


class KVCache:
    """Keys and values of the tokens seen so far; by default each layer's store grows.

    `ahead` [B]: by how much the positions of a row's next tokens exceed their count (an image's
    tokens may share positions); None: by nothing.
    """

    def __init__(self, layers: int | Sequence[Store]) -> None:
        self.stores: list[Store] = (
            [Growing() for _ in range(layers)] if isinstance(layers, int) else list(layers)
        )
        self.ahead: Tensor | None = None

    @classmethod
    def static(cls, layers: int, room: int) -> KVCache:
        """Allocated once for `room` tokens; more than those are refused."""
        return cls([Growing(room) for _ in range(layers)])

    @classmethod
    def sliding(cls, windows: Sequence[int | None]) -> KVCache:
        """Layers with a window hold no more than about twice that many tokens."""
        return cls([Growing() if w is None else Windowed(w) for w in windows])

    @classmethod
    def quantised(cls, layers: int) -> KVCache:
        """A half (of bf16) or a quarter (of fp32) of the memory, at int8's precision."""
        return cls([Quantised() for _ in range(layers)])

    @property
    def length(self) -> int:
        """Tokens seen (padding included)."""
        return self.stores[0].length if self.stores else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, T, K, D] of `layer`; returns what may be seen, [B, S, K, D]."""
        return self.stores[layer].update(k, v)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        for store in self.stores:
            store.crop(length)

    def select(self, rows: Tensor) -> None:
        """Keep, order or repeat the batch rows by index (beam search, finished rows)."""
        self.ahead = None if self.ahead is None else self.ahead[rows]
        for store in self.stores:
            store.select(rows)
