"""Formats in the tiles that the native decoding kernels read (`ops/native/decode.c`).

int8   one scale per output row
int4   16 even levels, one scale per `group` input columns
nf4    16 levels at the quantiles of a normal distribution (arXiv:2305.14314), as int4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.errors import ConfigError, nearest
from topwork.ops.native.decode import Weight

EVEN = [float(i) for i in range(-8, 8)]
NORMAL = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
LEVELS = {"int4": EVEN, "nf4": NORMAL}
KINDS = ("int8", *LEVELS)


@dataclass(frozen=True)
class Tiles:
    """Rows in blocks of 16 and columns in blocks of 32.

    Held: `codes` int8 [out/16, in/32, 16, 32], or uint8 [out/16, in/32, 4, 32, 2]; `scales` fp32
    [out], or bf16 [out/16, in/group, 16]; `levels` fp32 [16] (int8: empty).
    """

    kind: str
    group: int = 32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"kind={self.kind!r} is not known{nearest(self.kind, KINDS)}; one of {KINDS}"
            )

    @property
    def four(self) -> bool:
        return self.kind in LEVELS

    def check(self, outputs: int, inputs: int) -> None:
        """Raise ConfigError when a weight [outputs, inputs] does not go into tiles."""
        if outputs % 16 or inputs % 32:
            raise ConfigError(
                f"a weight [{outputs}, {inputs}] cannot be quantised: 16 must divide its rows and "
                "32 its columns"
            )
        if self.four and (self.group % 32 or inputs % self.group):
            raise ConfigError(
                f"group={self.group} must be a multiple of 32 that divides the {inputs} input "
                "columns"
            )

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """`weight` [out, in] as it is held; each scale is the best of several."""
        levels = torch.tensor(LEVELS.get(self.kind, []), device=weight.device)
        codes, scales = [], []
        for start in range(0, len(weight), 4096):
            part = weight[start : start + 4096].float()
            if self.four:
                found, scale = self._rounded4(part, levels)
                codes.append(_packed(found))
                scales.append(scale.view(-1, 16, scale.shape[1]).transpose(1, 2))
            else:
                found, scale = _rounded8(part)
                codes.append(found.view(-1, 16, part.shape[1] // 32, 32).transpose(1, 2))
                scales.append(scale)
        return {"codes": torch.cat(codes), "scales": torch.cat(scales), "levels": levels}

    def decode(self, held: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Fill `out` [out, in] with the weight."""
        codes, scales = held["codes"], held["scales"]
        if not self.four:
            return out.copy_(codes.transpose(1, 2).reshape(out.shape) * scales[:, None])
        values = held["levels"][_unpacked(codes).int()].unflatten(1, (-1, self.group))
        scales = scales.transpose(1, 2).reshape(len(out), -1, 1)
        return out.copy_((values * scales.float()).flatten(1))

    def native(self, held: Mapping[str, Tensor], out: torch.Size, bias: Tensor | None) -> Weight:
        """The weight as the decoding kernels take it."""
        kind, levels = ("code4", held["levels"]) if self.four else ("int8", None)
        return Weight(held["codes"], out[0], out[1], kind, held["scales"], levels, self.group, bias)

    def __str__(self) -> str:
        return f"{self.kind}, group={self.group}" if self.four else self.kind

    def _rounded4(self, weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scales [out, in/group] with the least squared error of a few."""
        groups = weight.view(len(weight), -1, self.group)
        far = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        # int4 has one level more below zero: the farthest value goes there, whatever its sign.
        whole = far / -8 if self.kind == "int4" else far.abs()
        best = torch.full_like(whole, float("inf"))
        scales = torch.zeros_like(whole, dtype=torch.bfloat16)
        codes = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
        edges = (levels[1:] + levels[:-1]) / 2
        for share in (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74):
            scale = (whole * share).to(torch.bfloat16)
            safe = torch.where(scale == 0, 1.0, scale.float())[..., None]
            tried = torch.bucketize(groups / safe, edges)
            error = (levels[tried] * safe - groups).pow(2).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, scale, scales)
            codes = torch.where(better[..., None], tried.to(torch.uint8), codes)
        return codes.flatten(1), scales


def _rounded8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def _packed(codes: Tensor) -> Tensor:
    """Codes [out, in] below 16 → [out/16, in/32, 4, 32, 2]: the digits of 16 bits are 4 rows."""
    digits = codes.view(len(codes) // 16, 4, 4, -1, 32).permute(0, 3, 1, 4, 2)
    return digits[..., 0::2] | digits[..., 1::2] << 4


def _unpacked(packed: Tensor) -> Tensor:
    """The codes [out, in] again."""
    digits = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)  # [rows, columns, 4, 32, 4]
    return digits.permute(0, 2, 4, 1, 3).flatten(3).flatten(0, 2)
