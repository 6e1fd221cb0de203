"""GPT-2's linear layer, whose weight lies as [in, out]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from topwork import ops


class Conv1D(nn.Module):
    """x W + b with `weight` [nx, nf] and `bias` [nf], as GPT-2 stores them (its name there)."""

    def __init__(self, nf: int, nx: int, bias: bool = True) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf)) if bias else None

    def linear_parts(self) -> ops.LinearParts | None:
        """The same layer as a linear: a view of the weight, no copy."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        return None if hooked else ops.LinearParts(self.weight.t(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"
