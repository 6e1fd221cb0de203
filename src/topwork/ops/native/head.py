"""The head's log-probabilities in bf16 on AMX tiles (`head.c`)."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import call


def serves(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes `hidden` [N, C] and `weight` [V, C]."""
    same = hidden.dtype == weight.dtype == torch.bfloat16
    dense = weight.is_contiguous() and hidden.device.type == weight.device.type == "cpu"
    return same and dense and hidden.shape[1] % 32 == 0 and has_amx()


def logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [N] fp32 of `targets`, and their gradient for `hidden` [N, C]."""
    hidden = hidden.contiguous()
    found = torch.empty(len(targets), dtype=torch.float32)
    grad = torch.empty_like(hidden) if want_grad else None
    sizes = (len(hidden), *weight.shape, int(want_grad))
    onto = hidden if grad is None else grad
    call("topwork_head", hidden, weight, targets.contiguous(), found, onto, *sizes)
    return found, grad
