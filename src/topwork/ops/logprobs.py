"""Log-probabilities of given tokens, without ever holding the logits of all positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork.ops.dispatch import apply
from topwork.ops.native import head as tiled
from topwork.ops.recompute import recomputed

CHUNK = 128  # rows of logits in memory at once; measured best of 64 … 512 on CPU
TILED_CHUNK = 2048  # rows whose running sums the kernel holds


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden Wᵀ)[targets]: `hidden` [N, C], `weight` [V, C], `targets` [N] → [N] fp32.

    Exact. With a frozen `weight` each row's gradient is formed while its logits are there,
    Wₜ - softmax·W, and only scaled in the backward pass, so that no logits are computed twice.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return token_logprobs_of(lambda rows: rows @ weight.t(), hidden, targets)
    return apply(_FrozenHead, hidden, weight, targets)


def token_logprobs_swapped(
    hidden: Tensor, targets: Tensor, weight: Tensor, places: Tensor, rows: Tensor
) -> Tensor:
    """`token_logprobs`, `rows` [k, C] in the `places` [k] of a frozen `weight`. Of it they alone
    have gradients: 1 at a target less the token's chance, times `hidden`."""
    whole = weight.detach().index_copy(0, places, rows.detach().to(weight.dtype))
    found = apply(_FrozenHead, hidden, whole, targets)
    if not (rows.requires_grad and torch.is_grad_enabled()):
        return found
    with torch.no_grad():
        seen = hidden.detach().float()
        said = (seen * whole[targets].float()).sum(1), seen @ whole[places].float().t()
        if not tiled.serves(hidden, whole):  # whose logits are not rounded
            said = said[0].to(hidden.dtype).float(), said[1].to(hidden.dtype).float()
        target, logits = said
        chances = (logits - (target - found)[:, None]).exp()  # [N, k]
        slopes = (targets[:, None] == places).float() - chances
    return found + apply(_Rows, rows, slopes, seen)


class _Rows(torch.autograd.Function):
    """Nothing [N], with the gradient of `slopes` [N, k] · `seen` [N, C] towards `rows` [k, C]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slopes: Tensor, seen: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(slopes, seen)
        return slopes.new_zeros(len(slopes))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        slopes, seen = ctx.saved_tensors
        return (slopes * grad[:, None]).t() @ seen, None, None


def token_logprobs_of(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, smoothing: float = 0.0
) -> Tensor:
    """The same for any `head` [N, C] → [N, V]; each chunk's logits are recomputed in backward.

    `smoothing`: the share of the mean over all tokens' log-probabilities in place of the target's.
    """

    def one(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = head(rows).float()
        said = logits.gather(1, wanted[:, None])[:, 0]
        if smoothing:
            said = (1 - smoothing) * said + smoothing * logits.mean(1)
        return said - logits.logsumexp(1)

    pieces = []
    for rows, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK)):
        if torch.is_grad_enabled():
            pieces.append(recomputed(one, rows, wanted))
        else:
            pieces.append(one(rows, wanted))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


class TokenStatistics(NamedTuple):
    """Of the distribution at each of N positions, all [N] fp32: `entropy` in nats; `collision`,
    log Σ p², the log-probability of drawing one token twice; `hit`, 1 where the target is the
    likeliest token."""

    entropy: Tensor
    collision: Tensor
    hit: Tensor


@torch.no_grad()
def token_statistics(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
) -> TokenStatistics:
    """Statistics at `hidden` [N, C] of the logits of `head`, in chunks and without gradients."""
    pieces = []
    for rows, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK)):
        logprobs = head(rows).float().log_softmax(1)
        squares = (2 * logprobs).logsumexp(1)
        hit = (logprobs.argmax(1) == wanted).float()
        entropy = logprobs.exp().mul_(logprobs).sum(1).neg_()
        pieces.append((entropy, squares, hit))
    if not pieces:
        return TokenStatistics(*(hidden.new_zeros(0, dtype=torch.float32) for _ in range(3)))
    return TokenStatistics(*(torch.cat(column) for column in zip(*pieces)))


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        wants_grad = ctx.needs_input_grad[0]
        found = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        rows_grad = torch.empty_like(hidden) if wants_grad else None
        tiles = tiled.serves(hidden, weight)
        one = tiled.logprobs if tiles else _rows
        chunk = TILED_CHUNK if tiles else CHUNK
        for at in range(0, len(targets), chunk):
            part = slice(at, at + chunk)
            found[part], grad = one(hidden[part], weight, targets[part], wants_grad)
            if rows_grad is not None and grad is not None:
                rows_grad[part] = grad
        ctx.save_for_backward(rows_grad)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (rows_grad,) = ctx.saved_tensors
        return rows_grad * grad[:, None].to(rows_grad.dtype), None, None


def _rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of one chunk and, if asked for, their gradient."""
    logits = (hidden @ weight.t()).float()
    wanted = targets[:, None]
    chosen = logits.gather(1, wanted)
    top = logits.amax(1, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(1, keepdim=True)
    found = (chosen - top - total.log())[:, 0]
    if not wants_grad:
        return found, None
    weights.div_(-total).scatter_add_(1, wanted, torch.ones_like(total))
    return found, weights.to(hidden.dtype) @ weight
