"""Divergence between two models' next-token distributions, without whole logits of either."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.recompute import recomputed

Head = Callable[[Tensor], Tensor]
LEAST = 1e-8  # below it a probability counts as this
NOTHING = -80.0  # the logarithm of a chance that counts for nothing
CHUNK = 128  # rows of both models' logits in memory at once


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence [N] of log-probabilities [N, V] (arXiv:2306.13649).

    β = 0 is KL(teacher ‖ student), β = 1 KL(student ‖ teacher), between them
    β·KL(teacher ‖ mixture) + (1 - β)·KL(student ‖ mixture), mixture = β·teacher + (1 - β)·student.
    """
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(1)


@dataclass(frozen=True)
class Likeliest:
    """The tokens on which two distributions are compared: the `k` that the student finds likeliest.
    The others count as one more token (`rest`), or not at all, both sides' k then adding up to 1.
    """

    k: int
    rest: bool = False

    def of(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, V] of both as [N, k], or [N, k + 1] with the rest."""
        own, places = student.topk(min(self.k, student.shape[1]), 1)
        other = teacher.gather(1, places)
        if self.rest:
            return _with_rest(own), _with_rest(other)
        return own.log_softmax(1), other.log_softmax(1)


def _with_rest(logprobs: Tensor) -> Tensor:
    held = logprobs.logsumexp(1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, (-held.expm1()).log()], 1)


def token_divergence(
    student_head: Head,
    student: Tensor,
    teacher_head: Head,
    teacher: Tensor,
    beta: float = 1.0,
    temperature: float = 1.0,
    among: Likeliest | None = None,
) -> Tensor:
    """`divergence` [N] fp32 at the hidden states `student` [N, C] and `teacher` [N, C'], over all
    tokens or `among` some.

    The student's gradients, its head's included, are formed while a chunk's logits are there.
    """
    weights = tuple(p for p in _parameters(student_head) if p.requires_grad)

    def one(rows: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (teacher_head(other).float() / temperature).log_softmax(1)
        own = (student_head(rows).float() / temperature).log_softmax(1)
        return divergence(*((own, wanted) if among is None else among.of(own, wanted)), beta)

    if not torch.is_grad_enabled():
        pieces = [one(*part) for part in zip(student.split(CHUNK), teacher.split(CHUNK))]
        return torch.cat(pieces) if pieces else student.new_zeros(0, dtype=torch.float32)
    if weights:  # each row's loss may be weighted later, so their gradient cannot be formed yet
        pieces = [
            recomputed(one, *part) for part in zip(student.split(CHUNK), teacher.split(CHUNK))
        ]
        return torch.cat(pieces)
    return _Rowwise.apply(student, teacher, one)


def sparse_divergence(
    student_head: Head, student: Tensor, ids: Tensor, teacher: Tensor, beta: float, rest: bool
) -> Tensor:
    """`divergence` [N] fp32 at the hidden states `student` [N, C] from a teacher of whom only some
    log-probabilities `teacher` [N, K] of the tokens `ids` [N, K] are known (-inf: left out).

    The others count as one more token (`rest`), or not at all, both sides' K then adding up to 1.
    """

    def one(rows: Tensor, places: Tensor, said: Tensor) -> Tensor:
        own = student_head(rows).float().log_softmax(1).gather(1, places)
        known = said > -math.inf
        own, other = own.masked_fill(~known, NOTHING), said.masked_fill(~known, NOTHING)
        if rest:
            return divergence(_with_rest(own), _with_rest(other), beta)
        return divergence(own.log_softmax(1), other.log_softmax(1), beta)

    if not len(student):
        return student.new_zeros(0, dtype=torch.float32)
    return _in_chunks(one, (student, ids, teacher))


def sorted_distance(
    student_head: Head, student: Tensor, student_scale: Tensor, student_temperature: float,
    teacher_head: Head, teacher: Tensor, teacher_scale: Tensor, teacher_temperature: float,
) -> Tensor:  # fmt: skip
    """Σₖ |s·p₍ₖ₎ - t·q₍ₖ₎| [N] fp32 over the sorted probabilities of two models, each scaled
    ([N]), at hidden states [N, C] and [N, C']; vocabularies of any size (ULD, arXiv:2402.12030).

    The student's chunks are computed again in the backward pass.
    """

    def one(rows: Tensor, scale: Tensor, other: Tensor, other_scale: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (teacher_head(other).float() / teacher_temperature).softmax(1)
        found = (student_head(rows).float() / student_temperature).softmax(1)
        return _sorted_gap(found * scale[:, None], wanted * other_scale[:, None])

    if not len(student):
        return student.new_zeros(0, dtype=torch.float32)
    return _in_chunks(one, (student, student_scale, teacher, teacher_scale))


def hybrid_distance(
    student_head: Head, student: Tensor, student_scale: Tensor, student_temperature: float,
    teacher_head: Head, teacher: Tensor, teacher_scale: Tensor, teacher_temperature: float,
    same: tuple[Tensor, Tensor], beta: float,
) -> Tensor:  # fmt: skip
    """`sorted_distance` where some tokens are in both vocabularies: [N, 2] fp32.

    `same`: the ids [M] of these in the student's vocabulary and in the teacher's. First their
    divergence, as in `divergence` but of measures, whose sums need not agree: never negative, and
    0 only where they are the same. Then the sorted distance of all other tokens.
    """

    def one(rows: Tensor, scale: Tensor, other: Tensor, other_scale: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (teacher_head(other).float() / teacher_temperature).softmax(1)
            wanted = wanted * other_scale[:, None]
        found = (student_head(rows).float() / student_temperature).softmax(1) * scale[:, None]
        p, q = found[:, same[0]].clamp_min(LEAST), wanted[:, same[1]].clamp_min(LEAST)
        apart = divergence(p.log(), q.log(), beta)
        if beta in (0, 1):  # Σ p·log p/q alone is least at p = q/e; mixtures need no such term
            apart = apart + (p - q).sum(1) * (1 - 2 * beta)
        rest = _sorted_gap(_without(found, same[0]), _without(wanted, same[1]))
        return torch.stack((apart, rest), 1)

    if not len(student):
        return student.new_zeros(0, 2, dtype=torch.float32)
    return _in_chunks(one, (student, student_scale, teacher, teacher_scale))


def _without(values: Tensor, columns: Tensor) -> Tensor:
    keep = torch.ones(values.shape[1], dtype=torch.bool, device=values.device)
    keep[columns] = False
    return values[:, keep]


def _sorted_gap(p: Tensor, q: Tensor) -> Tensor:
    """Σ |p - q| [N] over the sorted columns of [N, V] and [N, V']."""
    width = max(p.shape[1], q.shape[1])
    p, q = (x.sort(1, descending=True).values for x in (p, q))
    p, q = (F.pad(x, (0, width - x.shape[1])) for x in (p, q))
    return (p - q).abs().sum(1)


def _in_chunks(one: Callable[..., Tensor], sides: tuple[Tensor, ...]) -> Tensor:
    """`one` over a few rows at a time, which the backward pass computes again."""
    pieces = [
        recomputed(one, *part) if torch.is_grad_enabled() else one(*part)
        for part in zip(*(side.split(CHUNK) for side in sides))
    ]
    return torch.cat(pieces)


def _parameters(head: Head) -> list[Tensor]:
    """The parameters behind `head`, a module or the bound method of one."""
    owner: Any = getattr(head, "__self__", head)
    output = getattr(owner, "get_output_embeddings", None)
    module = output() if callable(output) else owner
    return list(module.parameters()) if isinstance(module, torch.nn.Module) else []


class _Rowwise(torch.autograd.Function):
    """A function of each row by itself: its gradient is formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, one: Any) -> Tensor:  # type: ignore[override]
        found = torch.empty(len(student), dtype=torch.float32, device=student.device)
        slopes = torch.empty_like(student)
        for at in range(0, len(student), CHUNK):
            part = slice(at, at + CHUNK)
            with torch.enable_grad():
                rows = student[part].detach().requires_grad_()
                value = one(rows, teacher[part])
                (slopes[part],) = torch.autograd.grad(value.sum(), rows)
            found[part] = value.detach()
        ctx.save_for_backward(slopes)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None].to(slopes.dtype), None, None
