"""Orthogonal matrices in blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(skew: Tensor) -> Tensor:
    """(I - S)(I + S)⁻¹ of skew-symmetric S [N, b, b]: a rotation."""
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., N·b], each of its N parts of b times its block [N, b, b] (or one for all)."""
    parts = x.unflatten(-1, (-1, blocks.shape[-1]))
    if blocks.shape[0] == 1:
        return (parts @ blocks[0]).flatten(-2)
    return torch.einsum("...nb,nbc->...nc", parts, blocks).flatten(-2)


def some_left_out(blocks: Tensor, rate: float, training: bool) -> Tensor:
    """`blocks` with a share `rate` of them at the identity, in training."""
    count = blocks.shape[0]
    if not training or not rate or count == 1:
        return blocks
    out = torch.randperm(count, device=blocks.device)[: int(rate * count)]
    mask = torch.zeros(count, 1, 1, device=blocks.device, dtype=blocks.dtype)
    mask[out] = 1
    return (1 - mask) * blocks + mask * torch.eye(blocks.shape[-1], device=blocks.device)
