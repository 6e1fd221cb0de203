"""Rotary position tables: default, linear, dynamic NTK, llama3, yarn, longrope, proportional."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.errors import ConfigError, nearest

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


@dataclass(frozen=True)
class RotarySpec:
    """Which angles turn the heads.

    `dim` is the rotated width, `theta` the base, `context` the model's max_position_embeddings
    and `original` the length of pre-training where a scaling stretches it. `interleaved`:
    neighbouring dimensions turn together, else those half the width apart. `wide`: cos and sin stay
    fp32, and so does the turn. longrope divides the angles by `short_factor`, beyond the original
    length by `long_factor`; proportional turns only the first `share` of them. `sections`: tokens
    may have several positions (time, height, width), which take turns in setting so many angles
    each (M-RoPE, arXiv:2409.12191).
    """

    dim: int
    theta: float
    context: int
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    interleaved: bool = False
    wide: bool = False
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    share: float = 1.0
    sections: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ConfigError(
                f"rope_type={self.kind!r} is not known{nearest(self.kind, SCALINGS)}; "
                f"known: {', '.join(SCALINGS)}"
            )
        if self.dim % 2 or self.dim <= 0:
            raise ConfigError(f"rotary width {self.dim} must be even and positive")
        if self.sections and sum(self.sections) != self.dim // 2:
            raise ConfigError(f"mrope_section={self.sections} must sum to {self.dim // 2} angles")
        for name in ("short_factor", "long_factor"):
            if self.kind == "longrope" and len(getattr(self, name)) != self.dim // 2:
                raise ConfigError(
                    f"longrope needs {self.dim // 2} numbers in {name}, got "
                    f"{len(getattr(self, name))}"
                )

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for integer `positions` [B, T] or [B, T, 3]; see `rotary_table`."""
        return rotary_table(self, positions, dtype)


def inverse_frequencies(spec: RotarySpec, length: int) -> Tensor:
    """Angles per position [dim/2], fp32. `length`: tokens in sight ("dynamic", "longrope")."""
    steps = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    if spec.kind == "dynamic":
        length = max(length, spec.context)
        stretch = spec.factor * length / spec.context - (spec.factor - 1)
        return 1.0 / (spec.theta * stretch ** (spec.dim / (spec.dim - 2))) ** steps
    plain = 1.0 / spec.theta**steps
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, plain)
    if spec.kind == "yarn":
        return _yarn(spec, plain)
    if spec.kind == "longrope":
        factors = spec.long_factor if length > spec.original else spec.short_factor
        return plain / torch.tensor(factors)
    if spec.kind == "proportional":
        turning = int(spec.share * spec.dim // 2)
        return plain / spec.factor * (torch.arange(spec.dim // 2) < turning)
    return plain


def _llama3(spec: RotarySpec, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a blend between."""
    turns = spec.original * plain / (2 * math.pi)  # rotations over the original context
    low, high = spec.low_freq_factor, spec.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / spec.factor + blend * plain


def _yarn(spec: RotarySpec, plain: Tensor) -> Tensor:
    """YaRN (arXiv:2309.00071): interpolate dimensions that turn less than beta_slow times."""

    def dimension_of(turns: float) -> float:
        ratio = spec.original / (turns * 2 * math.pi)
        return spec.dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return plain / spec.factor * ramp + plain * (1 - ramp)


def attention_factor(spec: RotarySpec) -> float:
    """By what cos and sin are multiplied (the temperature of yarn and longrope)."""
    if spec.kind not in ("yarn", "longrope"):
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.kind == "longrope":
        stretched = spec.factor > 1
        return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original)) if stretched else 1.0

    def temperature(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.mscale and spec.mscale_all_dim:
        return temperature(spec.mscale) / temperature(spec.mscale_all_dim)
    return temperature(1.0)


def rotary_table(spec: RotarySpec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, dim/2] in `dtype` for integer `positions`; formed in fp32.

    `positions` [B, T], or with sections [B, T, axes].
    """
    moving = spec.kind in ("dynamic", "longrope") and positions.numel()
    length = int(positions.max()) + 1 if moving else 0
    dtype = torch.float32 if spec.wide else dtype
    if positions.dim() == 2:
        positions = positions[..., None]
    else:
        axes = [i % positions.shape[-1] for i, n in enumerate(spec.sections) for _ in range(n)]
        positions = positions[..., axes]  # [B, T, dim/2]
    angles = positions.float() * inverse_frequencies(spec, length).to(positions.device)
    factor = attention_factor(spec)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
