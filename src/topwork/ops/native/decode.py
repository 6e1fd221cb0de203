"""Programs for `decode.c`: a decoder's step for a few rows, in bf16 on the CPU."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import library

MOST_ROWS = 256
FORMATS = {"bf16": 0, "int8": 1, "code4": 2}
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2}
(EMBED, NORM, LINEARS, ROTARY, APPEND, ATTEND, GATE, LOW_RANK, SELECT, ADD) = range(10)
KEYS_AT = {APPEND: (2, 3), ATTEND: (5, 6)}  # which arguments are a layer's keys and values
PAGE_AT = {APPEND: 5, ATTEND: 7}


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

    def fits(self) -> bool:
        """Whether the kernel can take it."""
        tensors = [t for t in (self.data, self.scale, self.table, self.bias) if t is not None]
        plain = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        dtype = self.format != "bf16" or self.data.dtype == torch.bfloat16
        bias = self.bias is None or self.bias.dtype == torch.bfloat16
        return plain and dtype and bias and self.inputs % 32 == 0 and self.out % 16 == 0


@dataclass(frozen=True)
class Low:
    """scale · B A of one adapter: `a` [r, in], `b` [out, r], both bf16."""

    a: Tensor
    b: Tensor
    scale: float


class _Part(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("weight", "scale", "table", "bias", "y")] + [
        (n, ctypes.c_int64) for n in ("out", "format", "group", "stride", "add")
    ]


class _Low(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float), ("pad", ctypes.c_int32),
    ]  # fmt: skip


_STEP = ("ids", "positions", "pages", "first", "adapter", "choice", "pack")


class _Step(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int64)
        for n in ("rows", "wanted", "table_stride", "threads", "portable", "steady")
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
    _widest: int = 32
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
        self, x: Tensor, weight: Tensor, to: Tensor, eps: float, *,
        offset: float = 0.0, wide: bool = False,
    ) -> None:  # fmt: skip
        """`x` [rows, …, C] by its last axis, which `weight` [C] has too."""
        width = weight.shape[-1]
        vectors = x.numel() // (self.rows * width)
        self._add(NORM, x, weight, to, width, float(eps), vectors, float(offset), wide)

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
            one.scale = None if weight.scale is None else weight.scale.data_ptr()
            one.table = None if weight.table is None else weight.table.data_ptr()
            one.bias = None if weight.bias is None else weight.bias.data_ptr()
            one.y, one.out, one.add = y.data_ptr(), weight.out, add
            one.format, one.group, one.stride = FORMATS[weight.format], weight.group, y.stride(0)
        self._kept += [made, parts]
        self._add(LINEARS, x, width, ctypes.addressof(made), len(parts))

    def low_rank(self, x: Tensor, to: Tensor, terms: list[Low | None]) -> None:
        """to += scale B A x, by the term of each row's adapter."""
        made = (_Low * len(terms))()
        for one, term in zip(made, terms):
            if term is not None:
                one.a, one.b = term.a.data_ptr(), term.b.data_ptr()
                one.rank, one.scale = term.a.shape[0], term.scale
        self._kept += [made, terms]
        width = next(t.a.shape[1] for t in terms if t is not None)
        out = next(t.b.shape[0] for t in terms if t is not None)
        self._add(LOW_RANK, x, width, to, out, to.stride(0), ctypes.addressof(made))

    def rotary(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> None:
        """`x` [rows, heads · D] by tables [positions, D/2]."""
        self._add(ROTARY, x, heads, 2 * cos.shape[1], cos, sin)

    def append(self, k: Tensor, v: Tensor, width: int) -> int:
        """k, v [rows, width] to the row's next place; returns the place to `bind`."""
        return self._add(APPEND, k, v, 0, 0, width, 0)

    def attend(
        self, q: Tensor, to: Tensor, heads: int, kv_heads: int, size: int, *,
        scale: float, window: int | None = None, softcap: float | None = None,
    ) -> int:  # fmt: skip
        """Returns the place to `bind`."""
        return self._add(
            ATTEND, q, to, heads, kv_heads, size, 0, 0, 0, window or 0, scale, softcap or 0.0
        )

    def gate(self, gate: Tensor, up: Tensor, to: Tensor, activation: str) -> None:
        self._add(GATE, gate, up, to, to.shape[1], ACTIVATIONS[activation], gate.stride(0))

    def select(self, x: Tensor, to: Tensor, width: int) -> None:
        """From here on only the wanted rows are computed, which stand in `to`."""
        self._add(SELECT, x, to, width)

    # -- running ---------------------------------------------------------------------------------

    def bind(self, places: list[int], keys: Tensor, values: Tensor) -> None:
        """Let the instructions at `places` use these keys and values [pages, size, K, D]."""
        for place in places:
            code = list(self._code[place])
            for at, tensor in zip(KEYS_AT[code[0]], (keys, values)):
                code[1 + at] = tensor.data_ptr()
            code[1 + PAGE_AT[code[0]]] = keys.shape[1]
            self._code[place] = tuple(code)
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
            self.steady,
            *(t.data_ptr() for t in (ids, positions, pages, first, adapter, wanted, pack)),
        )  # fmt: skip
        kernels.topwork_decode(
            ctypes.c_void_p(code.data_ptr()), ctypes.c_int64(len(self._code)), ctypes.byref(step)
        )
