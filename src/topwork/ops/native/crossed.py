"""A token of a few rows through a decoder that looks at a memory (`crossed.c`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import call, library

MOST_ROWS, MOST_RANK, BLOCK, SCREENED = 96, 256, 256, 4
AT_ONCE = 32
ACTIVATIONS = {
    "silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3,
}  # fmt: skip
NORMS = ("norm_0", "norm_1", "norm_2")
LINEARS = ("q", "k", "v", "out", "query", "cross_out", "gate", "up", "down")


@dataclass(frozen=True)
class Pair:
    """The weight and the bias of a linear or a norm.

    `low`: A [r, in], Bᵀ [r, out], both fp32, and the scale of a term that joins a linear.
    """

    weight: Tensor
    bias: Tensor | None = None
    low: tuple[Tensor, Tensor, float] | None = None


def _structure(name: str, **fields: str) -> Any:
    """A C structure with fields of these kinds, whose names are words of one string."""
    kinds = {"at": ctypes.c_void_p, "whole": ctypes.c_int64, "real": ctypes.c_float}
    made = [(n, kinds[kind.rstrip("_")]) for kind, names in fields.items() for n in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": made})


def _halves(names: Sequence[str]) -> str:
    return " ".join(f"{name}_weight {name}_bias" for name in names)


_Low = _structure("_Low", at="a b", whole="rank", real="scale pad")
_Layer = _structure(
    "_Layer",
    at=f"{_halves((*NORMS, *LINEARS))} keys values memory_keys memory_values lows",
)
_Stack = _structure(
    "_Stack",
    at=f"layers words places {_halves(('first', 'last', 'head'))} more near codes steps doubts "
    "lengths highest",
    whole="count hidden heads size width vocab room texts_room reach activation centred before "
    "half tiles",
    real="eps scale word_scale head_scale",
    at_="x y q k v inner open said packed scores",
)
_Step = _structure(
    "_Step",
    whole="rows first position threads",
    at="ids from_ owner lengths logits peaks best own_peaks own_best lowest tried",
)


@functools.cache
def _kernel() -> Any:
    run = getattr(library(), "topwork_crossed", None)
    if run is not None:
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        run.restype = None
    return run


def ready() -> bool:
    """Whether the kernel is there."""
    return _kernel() is not None


@dataclass(frozen=True)
class Sizes:
    """Of a decoder: C, H, D, the feed-forward part's width and V, all but V multiples of 16."""

    hidden: int
    heads: int
    size: int
    width: int
    vocab: int

    def fit(self) -> bool:
        return not any(n % 16 for n in (self.hidden, self.size, self.width))


@dataclass(frozen=True)
class Means:
    """What `crossed.c` computes with: see there, and `StackSpec`."""

    activation: str
    centred: bool
    before: bool
    eps: float
    scale: float
    word_scale: float = 1.0
    head_scale: float = 1.0


class Program:
    """The decoder's parts written down; then `bind` keys and values, and `run` token by token.

    `layers`: the NORMS and LINEARS of each, less the gate where there is none. `ends`: the pairs
    "first" and "last" where there are such norms, and "head". `more` [V] is added to the logits;
    `near` [H, reach] fp32 to the scores of own keys, by distance; `places` [room, C] to the words
    [V, C].
    """

    def __init__(
        self, sizes: Sizes, means: Means, layers: Sequence[dict[str, Pair]], ends: dict[str, Pair],
        words: Tensor, room: int, *, places: Tensor | None = None, more: Tensor | None = None,
        near: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.sizes, self.room, self.dtype = sizes, room, words.dtype
        self.kept: list[Any] = [layers, ends, words, places, more, near]
        self._layers = (_Layer * len(layers))()
        for made, pairs in zip(self._layers, layers):
            _fill(made, pairs)
            if any(pair.low is not None for pair in pairs.values()):
                self.kept.append(_lows(pairs))
                made.lows = ctypes.addressof(self.kept[-1])
        self._stack = _Stack(
            layers=ctypes.addressof(self._layers), count=len(layers),
            room=room, reach=0 if near is None else near.shape[1],
            activation=ACTIVATIONS[means.activation], half=self.dtype is torch.bfloat16,
            tiles=has_amx(), **vars(sizes),
            **{k: v for k, v in vars(means).items() if k != "activation"},
        )  # fmt: skip
        _fill(self._stack, ends)
        for name, tensor in {"words": words, "places": places, "more": more, "near": near}.items():
            setattr(self._stack, name, None if tensor is None else tensor.data_ptr())
        self._rows = 0
        self._bound: list[Any] = []
        self._screen: tuple[Tensor, ...] = ()

    def bind(
        self, own: Sequence[tuple[Tensor, Tensor]], memory: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Use these keys and values of each layer: [R, H, room, D] and of texts [N, H, S, D]."""
        self._bound = [own, memory]
        for made, (keys, values), (seen, told) in zip(self._layers, own, memory):
            made.keys, made.values = keys.data_ptr(), values.data_ptr()
            made.memory_keys, made.memory_values = seen.data_ptr(), told.data_ptr()
        self._stack.room, self._stack.texts_room = own[0][0].shape[2], memory[0][0].shape[2]
        self._rows = 0

    def screen(self, wanted: bool = True) -> None:
        """From now on look for the best in fp32 among those that a copy of the head in 8 bits
        leaves; what is found is the same. The copy costs about what reading the head does. For a
        program that `can_screen`.
        """
        s, stack = self.sizes, self._stack
        self._screen = ()
        if wanted:
            codes = torch.empty(-(-s.vocab // 16) * 16, s.hidden, dtype=torch.uint8)
            told = torch.empty(3, s.vocab)
            self._screen = codes, *told, torch.empty(SCREENED, s.vocab)
            weight = self.kept[1]["head"].weight
            call(
                "topwork_screen", weight, codes, *told, *weight.shape,
                torch.get_num_threads(),
            )  # fmt: skip
        found = self._screen or (None,) * 5
        for name, tensor in zip(("codes", "steps", "doubts", "lengths", "highest"), found):
            setattr(stack, name, None if tensor is None else tensor.data_ptr())

    @property
    def can_screen(self) -> bool:
        """Whether there may be a copy: of a head in fp32, with no bias, of a width that fits."""
        hidden, head = self.sizes.hidden, self.kept[1]["head"]
        fits = hidden % 64 == 0 and hidden <= 1024
        return self.dtype is torch.float32 and head.bias is None and fits

    @property
    def screened(self) -> bool:
        """Whether there is a copy, and the last run had no more than four rows."""
        return bool(self._screen) and self._rows <= SCREENED

    @property
    def tried(self) -> int:
        """How many logits the last run computed in full behind the screen."""
        return int(self._tried.sum())

    def _make_room(self, rows: int, threads: int) -> None:
        """Buffers for what passes between the parts."""
        s, stack = self.sizes, self._stack
        wide, widest = s.heads * s.size, max(s.hidden, s.width, s.heads * s.size)
        widths = {
            "x": s.hidden, "y": s.hidden, "q": wide, "k": wide, "v": wide, "inner": widest,
            "open": widest,
        }  # fmt: skip
        made = {
            name: torch.empty(min(rows, AT_ONCE), width, dtype=self.dtype)
            for name, width in widths.items()
        }
        made["said"] = torch.empty(threads, AT_ONCE * BLOCK, dtype=self.dtype)
        made["packed"] = torch.empty(threads, 64 * widest * bool(stack.half), dtype=torch.bfloat16)
        made["scores"] = torch.empty(threads, max(stack.room, stack.texts_room) + 15)
        for name, tensor in made.items():
            setattr(stack, name, tensor.data_ptr())
        made["own_peaks"] = torch.empty(threads, AT_ONCE)
        made["own_best"] = torch.empty(threads, AT_ONCE, dtype=torch.int32)
        made["lowest"] = torch.empty(threads, SCREENED)
        self.logits = torch.empty(0)
        self._peaks, self._best = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        self._tried = torch.zeros(threads, dtype=torch.long)
        self._rows, self._threads, self._made = rows, threads, made

    def run(
        self, ids: Tensor, position: int, origin: Tensor, owner: Tensor, lengths: Tensor,
        whole: bool = True,
    ) -> Tensor:  # fmt: skip
        """Logits [R, V] fp32 of `ids` [R] at `position`; overwritten by the next run.

        Not `whole`: no more than their `best` are wanted.
        `origin` [R, room], `owner` [R] (which text) and `lengths` [N] are int32.
        """
        rows, threads = len(ids), torch.get_num_threads()
        if (rows, threads) != (self._rows, getattr(self, "_threads", 0)):
            self._make_room(rows, threads)
        if whole and not len(self.logits):
            self.logits = torch.empty(rows, self.sizes.vocab)
        step = _Step(position=position, threads=threads, lengths=lengths.data_ptr())
        step.tried = self._tried.data_ptr()
        for name in ("own_peaks", "own_best", "lowest"):
            setattr(step, name, self._made[name].data_ptr())
        given = {
            "ids": ids, "from_": origin, "owner": owner, "peaks": self._peaks, "best": self._best,
        }  # fmt: skip
        if whole:
            given["logits"] = self.logits
        for first in range(0, rows, AT_ONCE):
            step.first, step.rows = first, min(AT_ONCE, rows - first)
            for name, tensor in given.items():
                at = first * tensor.stride(0) * tensor.element_size()
                setattr(step, name, tensor.data_ptr() + at)
            _kernel()(ctypes.addressof(self._stack), ctypes.addressof(step))
        return self.logits

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The largest logit of each row [R] (NaN if one is) and where it first stands [R]."""
        return self._peaks, self._best.long()


def _fill(made: Any, pairs: dict[str, Pair]) -> None:
    for name, pair in pairs.items():
        setattr(made, f"{name}_weight", pair.weight.data_ptr())
        setattr(made, f"{name}_bias", None if pair.bias is None else pair.bias.data_ptr())


def _lows(pairs: dict[str, Pair]) -> Any:
    """The low-rank terms of a layer's linears in their order."""
    made = (_Low * len(LINEARS))()
    for one, name in zip(made, LINEARS):
        low = pairs[name].low if name in pairs else None
        if low is not None:
            a, b, one.scale = low
            one.a, one.b, one.rank = a.data_ptr(), b.data_ptr(), len(a)
    return made
