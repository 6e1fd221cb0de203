"""The gate of gated MLPs, keeping only its two inputs for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op, apply
from topwork.ops.native import elementwise as native


@Op
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv:2002.05202)."""
    return F.silu(gate) * up


@swiglu.variant("recompute", when=lambda gate, up: torch.is_grad_enabled() and gate.requires_grad)
def recomputing_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Saves `gate` and `up` alone: silu(gate) is formed again in the backward pass."""
    return apply(_SwiGlu, gate, up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return native.swiglu(gate, up) if native.serves(gate, up) else F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        if native.serves(dy, gate, up):
            return native.swiglu_backward(dy, gate, up)
        dup = F.silu(gate).mul_(dy)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dup
