"""Programs for `decode.c`: a decoder's step for a few rows, in bf16 on the CPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import library

MOST_ROWS = 256
FORMATS = {"bf16": 0, "int8": 1, "code4": 2}
ACTIVATIONS = {
    "silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3,
}  # fmt: skip
(EMBED, NORM, LINEARS, ROTARY, APPEND, ATTEND, GATE, LOW_RANK, SELECT, ADD, BEST) = range(11)
MOST_GROUPS, TILE = MOST_ROWS // 16, 512
# Which arguments are a layer's keys and values, the size of a page, and the strides.
KEYS_AT = {APPEND: (2, 3), ATTEND: (5, 6)}
PAGE_AT = {APPEND: 6, ATTEND: 7}
STRIDES_AT = {APPEND: 7, ATTEND: 11}


@dataclass(frozen=True)
class Weight:
    """A matrix [out, in] as `decode.c` reads it; see there for the formats."""

    data: Tensor
    out: int
    inputs: int
    format: str = "bf16"
    scale: Tensor | None = None
    table: Tensor | None = None
    group: int = 1
    bias: Tensor | None = None
    base: Tensor | None = None

    def fits(self) -> bool:
        """Whether the kernel can take it."""
        parts = (self.data, self.scale, self.base, self.table, self.bias)
        tensors = [t for t in parts if t is not None]
        plain = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        dtype = self.format != "bf16" or self.data.dtype == torch.bfloat16
        bias = self.bias is None or self.bias.dtype == torch.bfloat16
        return plain and dtype and bias and self.inputs % 32 == 0 and self.out % 16 == 0

    def part(self, rows: slice) -> Weight | None:
        """Some of the rows, without a copy; None where they cut blocks of 16."""
        start, stop = rows.start, rows.stop
        if (start, stop) == (0, self.out):
            return self
        if start % 16 or stop % 16:
            return None
        bias = None if self.bias is None else self.bias[rows]
        if self.format == "bf16":
            return replace(self, data=self.data[rows], out=stop - start, bias=bias)
        blocks = slice(start // 16, stop // 16)
        scale, base = self.scale, self.base
        return replace(
            self, data=self.data[blocks], out=stop - start, bias=bias,
            scale=None if scale is None else scale[rows if self.format == "int8" else blocks],
            base=None if base is None else base[blocks],
        )  # fmt: skip


@dataclass(frozen=True)
class Low:
    """scale · B A of one adapter: `a` [r, in], `b` [out, r], both bf16."""

    a: Tensor
    b: Tensor
    scale: float

    def padded(self) -> tuple[Tensor, Tensor]:
        """`a` with rows up to a multiple of 16 and `b` with columns up to one of 32, zero there."""
        rank = len(self.a)
        return F.pad(self.a, (0, 0, 0, -rank % 16)), F.pad(self.b, (0, -rank % 32))


class _Part(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("weight", "scale", "base", "table", "bias", "y")] + [
        (n, ctypes.c_int64) for n in ("out", "format", "group", "stride", "add")
    ]


class _Low(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float), ("pad", ctypes.c_int32),
    ]  # fmt: skip


class _LowPart(ctypes.Structure):
    _fields_ = [
        ("y", ctypes.c_void_p), ("terms", ctypes.c_void_p), ("out", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    ]  # fmt: skip


_STEP = ("ids", "positions", "pages", "first", "adapter", "choice", "pack")


class _Step(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int64)
        for n in ("rows", "wanted", "table_stride", "threads", "portable", "steady", "adapters")
    ] + [(n, ctypes.c_void_p) for n in _STEP]


def ready() -> bool:
    """Whether the kernels are there."""
    return library() is not None


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<fi", value, 0))[0]


@dataclass
class Program:
    """Instructions and the tensors that they read and write. Add instructions, then `run`.

    `rows` is the most that a run may have. `portable` takes the plain loops in place of AMX;
    `steady` computes a row in the same way however many there are.
    """

    rows: int
    portable: bool = False
    steady: bool = False
    _code: list[tuple[int, ...]] = field(default_factory=list)
    _kept: list[Any] = field(default_factory=list)
    _bound: dict[int, Any] = field(default_factory=dict)
    _widest: int = 32
    _adapters: int = 0
    _small: Any = None
    _fixed: Any = None

    def __post_init__(self) -> None:
        self.portable = self.portable or not has_amx()

    def buffer(self, *width: int) -> Tensor:
        """A tensor [rows, *width] bf16 for what passes between instructions."""
        made = torch.zeros(self.rows, *width, dtype=torch.bfloat16)
        self._kept.append(made)
        return made

    def _add(self, op: int, *arguments: Tensor | int | float | None) -> int:
        code = [op]
        for value in arguments:
            if isinstance(value, Tensor):
                self._kept.append(value)
                code.append(value.data_ptr())
            elif isinstance(value, float):
                code.append(_bits(value))
            else:
                code.append(value or 0)
        self._code.append((*code, *[0] * (16 - len(code))))
        self._fixed = None
        return len(self._code) - 1

    # -- instructions: what each does stands in decode.c -----------------------------------------

    def embed(self, table: Tensor, to: Tensor, scale: float = 1.0) -> None:
        self._add(EMBED, table, to, table.shape[1], scale)

    def norm(
        self, x: Tensor, weight: Tensor | None, to: Tensor, eps: float, *, width: int | None = None,
        offset: float = 0.0, wide: bool = False, bias: Tensor | None = None, centred: bool = False,
    ) -> None:  # fmt: skip
        """`x` [rows, …] by stretches of `width`, which a `weight` [C] or [n, C] tells by itself."""
        width = width or (x.shape[1] if weight is None else weight.shape[-1])
        vectors = x.numel() // (self.rows * width)
        turns = 1 if weight is None else weight.numel() // width
        self._add(
            NORM, x, weight, to, width, float(eps), vectors, float(offset), wide, bias, centred,
            turns,
        )  # fmt: skip

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """x += scale · y"""
        self._add(ADD, x, y, x.shape[1], float(scale))

    def linears(self, x: Tensor, parts: list[tuple[Weight, Tensor]], add: bool = False) -> None:
        """Each weight's product with `x` into its buffer, or onto what is there."""
        width = parts[0][0].inputs
        self._widest = max(self._widest, width)
        made = (_Part * len(parts))()
        for one, (weight, y) in zip(made, parts):
            one.weight = weight.data.data_ptr()
            for name in ("scale", "base", "table", "bias"):
                tensor = getattr(weight, name)
                setattr(one, name, None if tensor is None else tensor.data_ptr())
            one.y, one.out, one.add = y.data_ptr(), weight.out, add
            one.format, one.group, one.stride = FORMATS[weight.format], weight.group, y.stride(0)
        self._kept += [made, parts]
        self._add(LINEARS, x, width, ctypes.addressof(made), len(parts))

    def low_rank(self, x: Tensor, parts: list[tuple[Tensor, Sequence[Low | None]]]) -> None:
        """to += scale B A x for each (to, terms), by the term of each row's adapter.

        Must follow the `linears` of the same x.
        """
        made = (_LowPart * len(parts))()
        widest, inputs = 32, 0
        for one, (to, terms) in zip(made, parts):
            lows = (_Low * len(terms))()
            for low, term in zip(lows, terms):
                if term is None:
                    continue
                a, b = term.padded()
                low.a, low.b = a.data_ptr(), b.data_ptr()
                low.rank, low.scale = len(term.a), term.scale
                one.out, inputs = len(b), a.shape[1]
                widest = max(widest, b.shape[1])
                self._kept += [a, b]
            one.y, one.stride = to.data_ptr(), to.stride(0)
            one.terms = ctypes.addressof(lows)
            self._adapters = len(terms)
            self._kept.append(lows)
        steps = widest // 32
        size = len(parts) * MOST_GROUPS * steps * TILE
        if self._small is None or self._small.numel() < size:
            self._small = torch.zeros(size, dtype=torch.bfloat16)
        self._kept += [made, self._small]
        self._add(LOW_RANK, x, inputs, ctypes.addressof(made), len(parts), self._small, steps)

    def rotary(
        self, x: Tensor, heads: int, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
        wide: bool = False,
    ) -> None:  # fmt: skip
        """`x` [rows, heads · D], the first R of each head by tables [positions, R/2] fp32."""
        size, width = x.shape[1] // heads, 2 * cos.shape[1]
        self._add(ROTARY, x, heads, size, cos, sin, width, interleaved, wide)

    def append(self, k: Tensor, v: Tensor, kv_heads: int) -> int:
        """k, v [rows, K · D] to the row's next place; returns the place to `bind`."""
        return self._add(APPEND, k, v, 0, 0, kv_heads, k.shape[1] // kv_heads)

    def attend(
        self, q: Tensor, to: Tensor, heads: int, kv_heads: int, size: int, *, scale: float,
        window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    ) -> int:  # fmt: skip
        """Returns the place to `bind`."""
        return self._add(
            ATTEND, q, to, heads, kv_heads, size, 0, 0, 0, window or 0, float(scale),
            float(softcap or 0), 0, 0, 0, sinks,
        )  # fmt: skip

    def gate(self, gate: Tensor, up: Tensor | None, to: Tensor, activation: str) -> None:
        """to = act(gate) up, or act(gate) alone."""
        self._add(GATE, gate, up, to, to.shape[1], ACTIVATIONS[activation], gate.stride(0))

    def select(self, x: Tensor, to: Tensor, width: int) -> None:
        """From here on only the wanted rows are computed, which stand in `to`."""
        self._add(SELECT, x, to, width)

    def best(self, x: Tensor, found: Tensor, peak: Tensor) -> None:
        """The first of the largest of `x` [rows, V] int32, and its value fp32 (NaN if one is)."""
        self._add(BEST, x, x.shape[1], found, peak)

    # -- running ---------------------------------------------------------------------------------

    def bind(self, places: list[int], keys: Tensor, values: Tensor) -> None:
        """Let the instructions at `places` use these keys and values [pages, size, K, D], which lie
        alike; only D must lie in order.
        """
        strides = keys.stride()
        assert strides == values.stride()
        assert strides[3] == 1
        for place in places:
            code = list(self._code[place])
            for at, tensor in zip(KEYS_AT[code[0]], (keys, values)):
                code[1 + at] = tensor.data_ptr()
            code[1 + PAGE_AT[code[0]]] = keys.shape[1]
            at = 1 + STRIDES_AT[code[0]]
            code[at : at + 3] = strides[:3]
            self._code[place] = tuple(code)
            self._bound[place] = keys, values
        self._fixed = None

    def run(
        self, ids: Tensor, positions: Tensor, pages: Tensor, first: Tensor, adapter: Tensor,
        wanted: Tensor,
    ) -> None:  # fmt: skip
        """Run all instructions on rows with `ids` and `positions` [R] int64.

        `pages` [R, n], `first` [R], `adapter` [R] and the `wanted` rows are int32.
        """
        kernels = library()
        assert kernels is not None
        if self._fixed is None:
            code = torch.tensor(self._code, dtype=torch.int64)
            pack = torch.zeros(-(-self.rows // 16) * 16 * self._widest, dtype=torch.bfloat16)
            self._fixed = code, pack
        code, pack = self._fixed
        step = _Step(
            len(ids), len(wanted), pages.shape[1], torch.get_num_threads(), self.portable,
            self.steady, self._adapters,
            *(t.data_ptr() for t in (ids, positions, pages, first, adapter, wanted, pack)),
        )  # fmt: skip
        kernels.topwork_decode(
            ctypes.c_void_p(code.data_ptr()), ctypes.c_int64(len(self._code)), ctypes.byref(step)
        )
