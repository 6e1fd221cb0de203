"""Mixture of experts: each token through a few of many small MLPs (arXiv:1701.06538).

Letters: N tokens, k experts for each, M = N · k, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op


@Op
def grouped_linear(
    x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Rows of `x` [M, in], in groups of `counts`, each through its own `weight` [E, in, out]."""
    outputs = []
    for expert, rows in enumerate(x.split(list(counts))):
        if len(rows):
            y = rows @ weight[expert]
            outputs.append(y if bias is None else y + bias[expert])
    return torch.cat(outputs) if outputs else x.new_zeros(0, weight.shape[2])


def _on_a_gpu(x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None) -> bool:
    aligned = x.shape[-1] % 8 == 0 and weight.shape[-1] % 8 == 0
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and aligned and len(x) > 0


@grouped_linear.variant("grouped", when=_on_a_gpu)
def grouped_linear_kernel(
    x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """torch's grouped product: one launch for all experts. (On a CPU it is a slower loop.)"""
    ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    y = F.grouped_mm(x, weight, offs=ends)
    if bias is None:
        return y
    return y + bias.repeat_interleave(torch.tensor(counts, device=x.device), 0)


def through_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    experts: int,
    mlp: Callable[[Tensor, list[int]], Tensor],
    weigh_input: bool = False,
) -> Tensor:
    """Σⱼ weightsⱼ · expertⱼ(x) for `x` [N, C], `chosen` and `weights` [N, k] → [N, C].

    The tokens are sorted by expert, so that each expert's rows lie together: `mlp` gets them and
    how many belong to each. `weigh_input`: expertⱼ(weightsⱼ · x) instead.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # [M]
    rows = order // chosen.shape[1]
    counts = torch.bincount(flat, minlength=experts).tolist()
    shares = weights.flatten()[order, None]
    seen = x[rows]
    if weigh_input:
        return torch.zeros_like(x).index_add(0, rows, mlp((seen * shares).to(x.dtype), counts))
    return torch.zeros_like(x).index_add(0, rows, (mlp(seen, counts) * shares).to(x.dtype))


def load_balancing_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """E · Σₑ fₑ pₑ over all layers (arXiv:2101.03961): fₑ, how often expert e is among the `top_k`
    of a token, pₑ, its mean probability; `logits` [N, E] for each layer."""
    together = torch.cat(list(logits)).float()
    probabilities = together.softmax(-1)
    experts = together.shape[-1]
    chosen = torch.bincount(probabilities.topk(top_k, -1).indices.flatten(), minlength=experts)
    return experts * (chosen / len(together) * probabilities.mean(0)).sum()
