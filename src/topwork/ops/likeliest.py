"""The best few of a vocabulary, without sorting it."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.ops.dispatch import Op
from topwork.ops.native.build import available, call

MOST, STRETCH = 256, 256


@Op
def likeliest(logits: Tensor, count: int, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row [N, V] in order, and their ids: [N, count] each.

    As log-probabilities; if not `normalise`, as they are.
    """
    found = (logits.log_softmax(-1) if normalise else logits).topk(count)
    return found.values, found.indices


def _serves(logits: Tensor, count: int, normalise: bool = True) -> bool:
    plain = logits.dtype is torch.float32 and logits.device.type == "cpu"
    few = 0 < count <= min(MOST, logits.shape[1])
    graded = torch.is_grad_enabled() and logits.requires_grad
    return plain and few and not graded and logits.is_contiguous() and available()


@likeliest.variant("one pass", when=_serves)
def native_likeliest(logits: Tensor, count: int, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """Few stretches of a row hold one of its best."""
    rows, vocab = logits.shape
    values, ids = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.long)
    tops = torch.empty(rows, vocab // STRETCH + 1)
    call("topwork_likeliest", logits, values, ids, tops, rows, vocab, count, int(normalise))
    return values, ids
