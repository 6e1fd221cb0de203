"""Mamba's mixer (arXiv:2312.00752): a short convolution and a selective scan in attention's place.

Letters: B batch, T tokens, C hidden size, E channels, N state size, W width of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.nn.layers import ACTIVATIONS, linears


@dataclass(frozen=True)
class MambaSpec:
    """`width` channels E, states of `state` numbers each, steps of rank `rank`.

    A fresh mixer's steps lie between `step_min` and `step_max`, and not below `step_floor`.
    """

    width: int
    state: int
    kernel: int
    rank: int
    activation: str = "silu"
    bias: bool = False
    conv_bias: bool = True
    step_min: float = 0.001
    step_max: float = 0.1
    step_floor: float = 1e-4
    step_scale: float = 1.0


class RecurrentStore:
    """What one layer remembers: the last W-1 inputs of its convolution and its state."""

    def __init__(self) -> None:
        self.length = 0
        self.inputs: Tensor | None = None  # [B, W-1, E]
        self.state: Tensor | None = None  # [B, E, N]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("a recurrent layer has no keys and values to hold")

    def crop(self, length: int) -> None:
        if length == 0:
            self.length, self.inputs, self.state = 0, None, None
        elif length != self.length:
            raise ValueError(
                f"a recurrent state of {self.length} tokens cannot go back to {length}: it holds "
                "no single token; start again from an empty cache"
            )

    def select(self, rows: Tensor) -> None:
        if self.inputs is not None and self.state is not None:
            self.inputs = self.inputs.index_select(0, rows)
            self.state = self.state.index_select(0, rows)


class MambaMixer(nn.Module):
    """The mixer of one layer, with the names of its checkpoint."""

    def __init__(self, spec: MambaSpec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.in_proj = nn.Linear(hidden, 2 * spec.width, bias=spec.bias)
        self.conv1d = nn.Conv1d(
            spec.width, spec.width, spec.kernel, groups=spec.width, bias=spec.conv_bias
        )
        self.x_proj = nn.Linear(spec.width, spec.rank + 2 * spec.state, bias=False)
        self.dt_proj = nn.Linear(spec.rank, spec.width)
        self.A_log = nn.Parameter(
            torch.arange(1.0, spec.state + 1).log().repeat(spec.width, 1)
        )  # A = -exp(A_log)
        self.D = nn.Parameter(torch.ones(spec.width))
        self.out_proj = nn.Linear(spec.width, hidden, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]

    @torch.no_grad()
    def start_fresh(self) -> None:
        """The paper's values for training from nothing: A = -1 … -N, steps log-uniform."""
        spec = self.spec
        self.A_log.copy_(torch.arange(1.0, spec.state + 1).log())
        self.D.fill_(1.0)
        bound = spec.step_scale * spec.rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound)
        low, high = math.log(spec.step_min), math.log(spec.step_max)
        steps = torch.empty(spec.width).uniform_(low, high).exp_().clamp_(min=spec.step_floor)
        self.dt_proj.bias.copy_(steps + (-torch.expm1(-steps)).log())  # softplus gives the steps

    def forward(
        self, x: Tensor, place: Tensor, real: Tensor | None, store: RecurrentStore | None
    ) -> Tensor:
        """x [B, T, C] → [B, T, C].

        `place` [B, T]: how many tokens of its text stand before each; `real` [B, T]: False where
        there is padding.
        """
        spec, dtype = self.spec, x.dtype
        inner, gate = linears(x, (self.in_proj,))[0].chunk(2, -1)
        inner = self.activation(self._convolved(inner, place, store))
        if real is not None:
            inner = inner * real[..., None]
        low, b, c = linears(inner, (self.x_proj,))[0].split((spec.rank, spec.state, spec.state), -1)
        dt = F.softplus(linears(low, (self.dt_proj,))[0].float())
        state = None if store is None else store.state
        if state is None:
            state = dt.new_zeros(len(x), spec.width, spec.state)
        wide = inner.float()
        y, state = ops.selective_scan(
            wide, dt, -self.A_log.float().exp(), b.float(), c.float(), place == 0, state
        )
        if store is not None:
            store.state = state
            store.length += x.shape[1]
        y = (y + wide * self.D.float()) * F.silu(gate.float())
        return linears(y.to(dtype), (self.out_proj,))[0]

    def _convolved(self, x: Tensor, place: Tensor, store: RecurrentStore | None) -> Tensor:
        """Each channel [B, T, E] with its own weights over the last W tokens of the same text."""
        reach = self.spec.kernel - 1
        before = None if store is None else store.inputs
        if before is None:
            before = x.new_zeros(len(x), reach, x.shape[-1])
        seen = torch.cat((before, x), 1)
        if store is not None:
            store.inputs = seen[:, -reach:].detach() if reach else seen[:, :0]
        taps = self.conv1d.weight[:, 0]  # [E, W], the last for the token itself
        y = x * taps[:, -1]
        for back in range(1, reach + 1):
            earlier = seen[:, reach - back : reach - back + x.shape[1]]
            y = y + earlier * (place >= back)[..., None] * taps[:, -1 - back]
        return y if self.conv1d.bias is None else y + self.conv1d.bias
