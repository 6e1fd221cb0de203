"""fp32 linears whose numbers are sums of two bf16 numbers: what torch calls precision "high".

Off by default, as in torch. `torch.set_float32_matmul_precision("high")` turns it on for all, the
context below for what is called within it. It takes a processor with bf16 tiles (AMX).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op
from topwork.ops.lora import LinearParts, lora_linears
from topwork.ops.native import dense
from topwork.ops.packed import Packed

_on: ContextVar[bool] = ContextVar("sums_of_two", default=False)


@contextmanager
def sums_of_two() -> Iterator[None]:
    """Within it large fp32 linears without gradient are right to some 16 bits of each product."""
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


def _serves(x: Tensor, parts: Sequence[LinearParts], training: bool = False) -> bool:
    if not _on.get() and torch.get_float32_matmul_precision() == "highest":
        return False
    for part in parts:
        if part.terms or isinstance(part.weight, Packed):
            return False
        needed = x.requires_grad or part.weight.requires_grad
        if (needed and torch.is_grad_enabled()) or not dense.serves(x, part.weight, part.bias):
            return False
    return True


@lora_linears.variant("sums of two", when=_serves)
def dense_linears(
    x: Tensor, parts: Sequence[LinearParts], training: bool = False
) -> tuple[Tensor, ...]:
    """Three products of bf16 tiles for each fp32 one."""
    found = []
    for part in parts:
        assert isinstance(part.weight, Tensor)
        found.append(dense.linear(x, part.weight, part.bias))
    return tuple(found)


@Op
def linear_gelu(x: Tensor, part: LinearParts, training: bool = False) -> Tensor:
    """gelu(x Wᵀ + b), [..., in] → [..., out]."""
    return F.gelu(lora_linears(x, (part,), training)[0])


@linear_gelu.variant("sums of two", when=lambda x, part, training=False: _serves(x, (part,)))
def dense_linear_gelu(x: Tensor, part: LinearParts, training: bool = False) -> Tensor:
    """The activation is taken before anything is written."""
    assert isinstance(part.weight, Tensor)
    return dense.linear(x, part.weight, part.bias, gelu=True)
