"""The selective scan of Mamba (arXiv:2312.00752): a linear recurrence with input-dependent steps.

    hₜ = exp(Δₜ A) hₜ₋₁ + Δₜ xₜ Bₜ        yₜ = hₜ Cₜ

Letters: B batch, T tokens, E channels, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topwork.ops.dispatch import Op

CHUNK = 64  # tokens whose states are in memory at once


@Op
def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, E] and the last state [B, E, N], all fp32.

    `x`, `dt` [B, T, E]; `a` [E, N], negative; `b`, `c` [B, T, N]; `starts` [B, T] is True where
    nothing before may be remembered; `state` [B, E, N] stands before the first token.
    """
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * a) * ~starts[:, t, None, None]
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        outputs.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1), state


@selective_scan.variant("chunks", when=lambda x, dt, a, b, c, starts, state: True)
def chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Keeps one state per chunk; the backward pass forms each chunk's states again."""
    return _Scan.apply(x, dt, a, b, c, starts, state)


def _states(
    dt: Tensor, dx: Tensor, a: Tensor, b: Tensor, starts: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Decay and states [B, T, E, N] of one chunk; `dx` is Δ x."""
    decay = torch.exp(dt[..., None] * a).mul_(~starts[..., None, None])
    states = dx[..., None] * b[:, :, None, :]
    for t in range(dt.shape[1]):
        state = states[:, t].addcmul_(decay[:, t], state)
    return decay, states


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, firsts, dx = torch.empty_like(x), [], dt * x
        for at in range(0, x.shape[1], CHUNK):
            part = slice(at, at + CHUNK)
            firsts.append(state)
            _, states = _states(dt[:, part], dx[:, part], a, b[:, part], starts[:, part], state)
            torch.matmul(states, c[:, part, :, None], out=y[:, part, :, None])
            state = states[:, -1].clone()
        ctx.save_for_backward(x, dt, a, b, c, starts, torch.stack(firsts))
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, dt, a, b, c, starts, firsts = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (x, dt, b, c)]
        da, after = torch.zeros_like(a), dlast  # `after`: the gradient of the state behind a chunk
        for i in reversed(range(len(firsts))):
            part = slice(i * CHUNK, (i + 1) * CHUNK)
            xs, step, bs, cs, out = (t[:, part] for t in (x, dt, b, c, dy))
            first = firsts[i]
            decay, states = _states(step, step * xs, a, bs, starts[:, part], first)
            grads[3][:, part] = torch.einsum("bten,bte->btn", states, out)
            grad = out[..., None] * cs[:, :, None, :]
            for t in reversed(range(grad.shape[1])):
                after = grad[:, t].add_(after) * decay[:, t]
            before = torch.cat((first[:, None], states[:, :-1]), 1)
            dpower = before.mul_(grad).mul_(decay)  # of Δ A in the exponent
            da += torch.einsum("bten,bte->en", dpower, step)
            ddx = torch.einsum("bten,btn->bte", grad, bs)
            grads[2][:, part] = torch.einsum("bten,bte->btn", grad, step * xs)
            grads[0][:, part] = ddx * step
            grads[1][:, part] = ddx * xs + torch.einsum("bten,en->bte", dpower, a)
        dx, ddt, db, dc = grads
        return dx, ddt, da, db, dc, None, after
