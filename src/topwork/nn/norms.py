"""The norms of decoders, each chosen by a `NormSpec`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError, nearest


@dataclass(frozen=True)
class NormSpec:
    """Which norm, by `kind`:

    rms: w · x/rms(x), rounded to the input's dtype before w (Llama)
    rms-wide: the same, rounded after w (OLMo 2, gpt-oss)
    rms-offset: (1 + w) · x/rms(x), rounded after (Gemma)
    layer, layer-bias: LayerNorm with w, with w and b
    plain-layer: LayerNorm without parameters (OLMo)
    l2: x/rms(x) without parameters (Llama 4's queries and keys)
    """

    kind: str = "rms"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in NORMS:
            raise ConfigError(f"norm kind {self.kind!r} is not known{nearest(self.kind, NORMS)}")

    def build(self, *shape: int) -> nn.Module:
        """The norm over the last axis, with a weight of `shape`."""
        return NORMS[self.kind](shape, self.eps)


class RmsNorm(nn.Module):
    """Root-mean-square norm with a learned `weight`."""

    wide, offset = False, False

    def __init__(self, shape: int | tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(_shape(shape), 0.0 if self.offset else 1.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float() if self.offset else self.weight
        return ops.rms_norm(x, weight, self.eps, self.wide)


class WideRmsNorm(RmsNorm):
    """The weight multiplies before the result is rounded."""

    wide = True


class OffsetRmsNorm(RmsNorm):
    """The weight is stored as its distance from one."""

    wide, offset = True, True


class LayerNorm(nn.Module):
    """Mean and variance norm over the last axis, with a `weight` (of several axes, if need be)."""

    biased = False

    def __init__(self, shape: int | tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_shape(shape)))
        self.bias = nn.Parameter(torch.zeros(_shape(shape))) if self.biased else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        unit = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (unit * self.weight.float()).to(x.dtype)


class BiasedLayerNorm(LayerNorm):
    """With a bias too."""

    biased = True


class PlainLayerNorm(nn.Module):
    """Mean and variance norm without parameters."""

    def __init__(self, shape: int | tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class L2Norm(PlainLayerNorm):
    """Root-mean-square norm without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


NORMS: dict[str, type[RmsNorm] | type[LayerNorm] | type[PlainLayerNorm]] = {
    "rms": RmsNorm,
    "rms-wide": WideRmsNorm,
    "rms-offset": OffsetRmsNorm,
    "layer": LayerNorm,
    "layer-bias": BiasedLayerNorm,
    "plain-layer": PlainLayerNorm,
    "l2": L2Norm,
}


def _shape(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else shape
