"""One-pass forms of what a block does between its products (`elementwise.c`); bf16 and fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.ops.native.build import call, library

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "float"}


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on the CPU, of one type they know, dense."""
    dtype = tensors[0].dtype
    return dtype in _SUFFIX and library() is not None and all(
        t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() for t in tensors
    )  # fmt: skip


def _run(name: str, *args: Tensor | int | float) -> None:
    first = args[0]
    assert isinstance(first, Tensor)
    call(f"topwork_{name}_{_SUFFIX[first.dtype]}", *args)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    _run("swiglu", gate, up, y, gate.numel())
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _run("swiglu_backward", dy, gate, up, dgate, dup, gate.numel())
    return dgate, dup


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows of `x` [..., C], and 1/√(mean(x²) + eps) fp32 for each row."""
    y, width = torch.empty_like(x), x.shape[-1]
    inverse = torch.empty(x.numel() // width, dtype=torch.float32)
    _run("rms_norm", x, weight, y, inverse, len(inverse), width, eps)
    return y, inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    _run("rms_norm_backward", dy, x, weight, inverse, dx, len(inverse), x.shape[-1])
    return dx


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """`x` [B, T, H, D] turned by cos, sin [B, T, R/2], or turned back."""
    heads, size = x.shape[2:]
    y, turned = torch.empty_like(x), cos.shape[-1]
    way = -1.0 if back else 1.0
    _run("rotary", x, cos, sin, y, x.numel() // size, heads, size, turned, int(interleaved), way)
    return y


def drop(x: Tensor, key: int, threshold: int, scale: float, onto: Tensor | None = None) -> Tensor:
    """`x` with elements dropped whose 16 random bits are below `threshold`; or `onto` plus that."""
    y = torch.empty_like(x) if onto is None else onto
    _run("drop", x, y, x.numel(), key, threshold, scale, int(onto is not None))
    return y
