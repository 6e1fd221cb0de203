"""Convolutions along time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TunedConv1d(nn.Module):
    """A grouped convolution whose weight is g · v / |v|, a norm for each tap (arXiv:1602.07868).

    With an even kernel the last frame is cut, so that there are as many frames as before.
    """

    def __init__(self, size: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(size, size // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(size))

    def start_fresh(self) -> None:
        with torch.no_grad():
            std = 2 * math.sqrt(1 / (self.kernel * len(self.bias)))
            nn.init.normal_(self.weight_v, std=std)
            self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))

    @property
    def weight(self) -> Tensor:
        norm = self.weight_v.float().norm(dim=(0, 1), keepdim=True).to(self.weight_v.dtype)
        return self.weight_v * (self.weight_g / norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] → [B, C, T]."""
        y = F.conv1d(x, self.weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return y if self.kernel % 2 else y[..., :-1]


class SpeechConv(nn.Module):
    """A convolution without padding, a norm (by channel over time, by frame, or none), a bend."""

    def __init__(
        self, sizes: tuple[int, int], kernel: int, stride: int, bias: bool, norm: str | None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv1d(*sizes, kernel, stride=stride, bias=bias)
        if norm == "group":
            self.layer_norm = nn.GroupNorm(sizes[1], sizes[1])
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(sizes[1])

    def start_fresh(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, T] → [B, out, T']; the activation is the caller's."""
        x = self.conv(x)
        if self.norm == "layer":
            return self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        return self.layer_norm(x) if self.norm else x


def frames_after(samples: int, kernels: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many frames convolutions without padding leave of `samples`; 0 for none."""
    for kernel, stride in zip(kernels, strides):
        samples = max(0, (samples - kernel) // stride + 1)
    return samples
