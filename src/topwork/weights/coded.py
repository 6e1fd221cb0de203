"""Checkpoints whose weights are codes of other software, decoded as they are read.

gptq                 arXiv:2210.17323; 2, 4 and 8 bits along the inputs
awq                  arXiv:2306.00978; 4 bits along the outputs
compressed-tensors   packed integers, int8 and fp8 with scales
fp8                  fp8 in tiles with a scale each (DeepSeek-V3, arXiv:2412.19437)
mxfp4                4-bit floats, a power of two to 32 of them (OCP MX), for stacked experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from topwork.errors import CheckpointError, ConfigError, nearest

Read = Callable[[], Tensor]
Parts = Mapping[str, Read]
# Nibble i of an AWQ word is this one of its eight columns.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@dataclass(frozen=True)
class Coding:
    """How one method stores a weight: its parts' names (the first two are always there), how it
    is made of them, and the end of its name. `idle`: parts that say nothing of the weight."""

    parts: tuple[str, ...]
    decode: Callable[[Parts, Mapping[str, Any]], Tensor]
    makes: str = ".weight"
    idle: tuple[str, ...] = ()


def decoded(
    tensors: Iterable[tuple[str, Read]], settings: Mapping[str, Any]
) -> Iterator[tuple[str, Read]]:
    """The file's tensors, with one weight in place of the parts that code it.

    `settings` is the checkpoint's `quantization_config`.
    """
    codings = _codings(settings)
    readers = dict(tensors)
    done: set[str] = set()
    for key, read in readers.items():
        if any(key.endswith(part) for coding in codings for part in coding.idle):
            continue
        stem, coding = _home(key, codings, readers)
        if coding is None:
            yield key, read
        elif stem not in done:
            done.add(stem)
            parts = {p[1:]: readers[stem + p] for p in coding.parts if stem + p in readers}
            yield stem + coding.makes, partial(_decode, stem, coding, parts, settings)


def check(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a method or an option that is not read."""
    _codings(settings)


def _codings(settings: Mapping[str, Any]) -> tuple[Coding, ...]:
    method = str(settings.get("quant_method", ""))
    if method not in METHODS:
        known = ("bitsandbytes", *METHODS)
        raise ConfigError(
            f"quant_method={method!r} is not known{nearest(method, known)}; known: "
            f"{', '.join(known)}"
        )
    bits = settings.get("bits", 4)
    if (method == "gptq" and bits not in (2, 4, 8)) or (method == "awq" and bits != 4):
        raise ConfigError(f"{method} in {bits} bits is not read")
    if method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        raise ConfigError(f"awq's version={settings['version']!r} is not read; 'gemm' is")
    return METHODS[method]


def _home(
    key: str, codings: tuple[Coding, ...], readers: Mapping[str, Read]
) -> tuple[str, Coding | None]:
    """What stands before the part's name, and the coding, where `key` is part of a weight."""
    for coding in codings:
        for part in coding.parts:
            stem = key.removesuffix(part)
            if stem != key and all(stem + needed in readers for needed in coding.parts[:2]):
                return stem, coding
    return key, None


def _decode(stem: str, coding: Coding, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    try:
        return coding.decode(parts, settings)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(f"{stem} cannot be decoded: {error!r}") from error


def _digits(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned digits of int32 `words`, lowest first, side by side along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    digits = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)  # [..., 32 / bits]
    dim %= words.dim()
    return digits.movedim(-1, dim + 1).flatten(dim, dim + 1)


def _gptq(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """(q - z) · s: qweight [in · bits/32, out], qzeros [groups, out · bits/32], scales
    [groups, out]; z is stored less one, except in the second format."""
    bits = settings.get("bits", 4)
    scales = parts["scales"]()
    codes = _digits(parts["qweight"](), bits, 0)  # [in, out]
    zeros = _digits(parts["qzeros"](), bits, 1)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    group = _group(settings, len(codes))
    places = parts["g_idx"]().long() if "g_idx" in parts else torch.arange(len(codes)) // group
    return _scaled(codes, zeros[places], scales[places], scales.dtype).t()


def _awq(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """(q - z) · s: qweight [in, out/8], qzeros [groups, out/8], scales [groups, out]."""
    scales = parts["scales"]()
    order = torch.tensor(AWQ_ORDER).argsort()

    def columns(words: Tensor) -> Tensor:
        return _digits(words, 4, 1).unflatten(1, (-1, 8))[..., order].flatten(1)

    codes = columns(parts["qweight"]())
    places = torch.arange(len(codes)) // _group(settings, len(codes))
    zeros = columns(parts["qzeros"]())[places]
    return _scaled(codes, zeros, scales[places], scales.dtype).t()


def _group(settings: Mapping[str, Any], inputs: int) -> int:
    group = settings.get("group_size", 128)
    return inputs if group in (None, -1) else group


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return ((codes - zeros).float() * scales.float()).to(dtype)


def _packed_integers(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """weight_packed [out, in · bits/32], each digit raised by half its range; weight_scale
    [out, groups]; weight_zero_point packed along the outputs."""
    scales, words = parts["weight_scale"](), parts["weight_packed"]()
    rows, columns = parts["weight_shape"]().tolist()
    fitting = [b for b in (2, 4, 8) if -(-columns * b // 32) == words.shape[1]]
    if not fitting:
        raise ValueError(f"{columns} columns in {words.shape[1]} words are not of 2, 4 or 8 bits")
    bits = fitting[0]
    half = 2 ** (bits - 1)
    codes = _digits(words, bits, 1)[:, :columns] - half
    if "weight_g_idx" in parts:
        places = parts["weight_g_idx"]().long()
    else:
        places = torch.arange(columns) // (columns // scales.shape[1])
    zeros = torch.zeros(1, 1)
    if "weight_zero_point" in parts:
        zeros = (_digits(parts["weight_zero_point"](), bits, 0)[:rows] - half)[:, places]
    return _scaled(codes, zeros, scales[:, places], scales.dtype)


def _scaled_values(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """weight in int8 or fp8 times weight_scale: one, one to an output, or one to a tile."""
    weight, scale = parts["weight"](), parts["weight_scale"]()
    zero = parts["weight_zero_point"]().float() if "weight_zero_point" in parts else None
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    spread = _over(scale.float(), weight.shape)
    values = weight.float()
    if zero is not None:
        values = values - _over(zero.reshape(-1, 1) if zero.dim() < 2 else zero, weight.shape)
    return (values * spread).to(scale.dtype)


def _over(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Each of `tiles` [a, b] repeated over its part of `shape`; the last ones may be short."""
    for dim, size in enumerate(shape):
        step = -(-size // tiles.shape[dim])
        tiles = tiles.repeat_interleave(step, dim).narrow(dim, 0, size)
    return tiles


def _fp8_tiles(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """weight in fp8 times weight_scale_inv, one scale to a tile of weight_block_size."""
    weight, scales = parts["weight"](), parts["weight_scale_inv"]().float()
    sizes = settings.get("weight_block_size") or [128, 128]
    if scales.dim() == 2:
        for dim, size in enumerate(sizes):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return (weight.float() * scales).to(torch.bfloat16)


def _mxfp4(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """blocks [E, out, groups, 16], the earlier value in the low half; scales [E, out, groups],
    exponents raised by 127. Gives [E, in, out]."""
    blocks, scales = parts["blocks"](), parts["scales"]()
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    digits = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    found = torch.ldexp(values[digits.int()], scales.int()[..., None] - 127)
    return found.flatten(-2).to(torch.bfloat16).transpose(1, 2)


_IDLE = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".input_zero_point")
METHODS: dict[str, tuple[Coding, ...]] = {
    "gptq": (Coding((".qweight", ".scales", ".qzeros", ".g_idx"), _gptq),),
    "awq": (Coding((".qweight", ".scales", ".qzeros"), _awq),),
    "compressed-tensors": (
        Coding(
            (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point",
             ".weight_g_idx"),
            _packed_integers, idle=_IDLE,
        ),
        Coding((".weight", ".weight_scale", ".weight_zero_point"), _scaled_values, idle=_IDLE),
    ),
    "fp8": (
        Coding((".weight", ".weight_scale_inv"), _fp8_tiles, idle=(".activation_scale",)),
    ),
    "mxfp4": (Coding(("_blocks", "_scales"), _mxfp4, makes=""),),
}  # fmt: skip
