"""From the hidden states of a text's tokens to one vector per text."""

from __future__ import annotations

import torch
from torch import Tensor


def first_tokens(hidden: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """The hidden state [N, C] of each text's first token: rows [N, T, C], or texts packed."""
    if lengths is None:
        return hidden[:, 0]
    ends = torch.tensor(lengths, device=hidden.device).cumsum(0)
    return hidden[0, torch.cat((ends.new_zeros(1), ends[:-1]))]


def mean_tokens(hidden: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """The mean [N, C] over each text's tokens: rows [N, T, C], or texts packed."""
    if lengths is None:
        return hidden.mean(1)
    sizes = torch.tensor(lengths, device=hidden.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), sizes)
    sums = hidden.new_zeros(len(lengths), hidden.shape[-1]).index_add(0, owner, hidden[0])
    return sums / sizes[:, None]
