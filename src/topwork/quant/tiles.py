"""Formats in the tiles that the native decoding kernels read (`ops/native/decode.c`).

int8   one scale per output row
int4   16 levels, one scale and one base per `group` input columns: scale · level + base. The levels
       are even, or nearer to each other in the middle, as suits the weight
nf4    16 levels at the quantiles of a normal distribution (arXiv:2305.14314), one scale per group
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from topwork.errors import ConfigError, nearest
from topwork.ops.native.decode import Weight

BENDS = (0.0, 0.2)  # how much nearer to each other the levels of int4 are in the middle
SHARES = tuple(product((1.0, 0.9, 0.8), repeat=2))  # of a group's least and largest value
NORMAL = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FOUR = ("int4", "nf4")
KINDS = ("int8", *FOUR)


@dataclass(frozen=True)
class Tiles:
    """Rows in blocks of 16 and columns in blocks of 32.

    Held: `codes` int8 [out/16, in/32, 16, 32], or uint8 [out/16, in/32, 4, 32, 2]; `scales` fp32
    [out], or bf16 [out/16, in/group, 16]; int4: `bases` like the scales; `levels` fp32 [16] (int8:
    empty).
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
        return self.kind in FOUR

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
        """`weight` [out, in] as it is held; scales and bases are the best of several."""
        if not self.four:
            return _eight(weight)
        levels = torch.tensor(NORMAL, device=weight.device)
        if self.kind == "int4":
            some = self._grouped(weight[:128])
            tried = [bent(bend, weight.device) for bend in BENDS]
            errors = [float(_with_base(some, levels)[-1].sum()) for levels in tried]
            levels = tried[errors.index(min(errors))]
        held: dict[str, list[Tensor]] = {}
        for part in weight.split(4096):
            groups = self._grouped(part)
            fit = _with_base if self.kind == "int4" else _scaled
            codes, *numbers, _ = fit(groups, levels)
            held.setdefault("codes", []).append(packed(codes.flatten(1)))
            for name, values in zip(("scales", "bases"), numbers):
                turned = values.view(-1, 16, values.shape[1]).transpose(1, 2)
                held.setdefault(name, []).append(turned.to(torch.bfloat16))
        return {name: torch.cat(parts) for name, parts in held.items()} | {"levels": levels}

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight.float().view(len(weight), -1, self.group)

    def decode(self, held: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Fill `out` [out, in] with the weight."""
        codes, scales = held["codes"], held["scales"]
        if not self.four:
            return out.copy_(codes.transpose(1, 2).reshape(out.shape) * scales[:, None])
        values = held["levels"][unpacked(codes).int()].unflatten(1, (-1, self.group))
        numbers = [
            held[name].transpose(1, 2).reshape(len(out), -1, 1).float()
            for name in ("scales", "bases")
            if name in held
        ]
        values *= numbers[0]
        if len(numbers) > 1:
            values += numbers[1]
        return out.copy_(values.flatten(1))

    def native(self, held: Mapping[str, Tensor], out: torch.Size, bias: Tensor | None) -> Weight:
        """The weight as the decoding kernels take it."""
        kind, levels = ("code4", held["levels"]) if self.four else ("int8", None)
        return Weight(
            held["codes"], out[0], out[1], kind, held["scales"], levels, self.group, bias,
            held.get("bases"),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.kind}, group={self.group}" if self.four else self.kind


def bent(bend: float, device: torch.device | None = None) -> Tensor:
    """16 levels from -7.5 to 7.5, of values that bf16 has: even ones for a `bend` of 0, else nearer
    to each other in the middle.
    """
    x = torch.linspace(-1, 1, 16, device=device)
    return (7.5 * x * (1 - bend + bend * x * x)).to(torch.bfloat16).float()


@cache
def _unbent(levels: tuple[float, ...]) -> list[float]:
    """a, b, c such that a u + b u³ + c u⁵ is about the place of u among `levels`, less 7.5."""
    u = torch.tensor(levels, dtype=torch.float64)
    u = torch.cat((u, (u[1:] + u[:-1]) / 2))
    place = torch.cat((torch.arange(-7.5, 8), torch.arange(-7.0, 8))).double()
    powers = torch.stack((u, u**3, u**5), 1)
    return torch.linalg.lstsq(powers, place[:, None]).solution[:, 0].tolist()


def _with_base(groups: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [out, n, group], scales, bases and squared errors [out, n] of groups of weights.

    From a share of the group's span on, codes and the least squares through them take turns.
    """
    a, b, c = _unbent(tuple(levels.tolist()))
    middle = groups.mean(-1, keepdim=True)

    def nearest(scale: Tensor, base: Tensor) -> Tensor:
        u = ((groups - base) / torch.where(scale == 0, 1.0, scale)).clamp_(-7.5, 7.5)
        square = u * u
        u *= a + square * (b + square * c)
        return (u + 7.5).round_().clamp_(0, 15).to(torch.int32)

    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    found: list[Tensor] = []
    for low, high in SHARES:
        scale = _short((high * most - low * least) / 15)
        base = _short(low * least + 7.5 * scale)
        codes = nearest(scale, base)
        for _ in range(2):
            values = levels[codes]
            mean = values.mean(-1, keepdim=True)
            spread = (values - mean).square().sum(-1, keepdim=True).clamp_min(1e-12)
            scale = _short(((values - mean) * groups).sum(-1, keepdim=True) / spread)
            base = _short(middle - scale * mean)
            codes = nearest(scale, base)
        error = (levels[codes] * scale + base - groups).square().sum(-1, keepdim=True)
        new = [codes.to(torch.uint8), scale, base, error]
        better = error < found[3] if found else torch.ones_like(error, dtype=torch.bool)
        found = [torch.where(better, x, y) for x, y in zip(new, found or new)]
    return found[0], found[1][..., 0], found[2][..., 0], found[3][..., 0]


def _scaled(groups: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, n, group], scales and squared errors [out, n] of groups of weights."""
    whole = groups.abs().amax(-1)
    best = torch.full_like(whole, float("inf"))
    scales = torch.zeros_like(whole)
    codes = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
    edges = (levels[1:] + levels[:-1]) / 2
    for share in (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74):
        scale = _short(whole * share)
        safe = torch.where(scale == 0, 1.0, scale)[..., None]
        tried = torch.bucketize(groups / safe, edges)
        error = (levels[tried] * safe - groups).pow(2).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        codes = torch.where(better[..., None], tried.to(torch.uint8), codes)
    return codes, scales, best


def _short(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _eight(weight: Tensor) -> dict[str, Tensor]:
    codes, scales = [], []
    for part in weight.float().split(4096):
        scale = part.abs().amax(1).clamp_min(1e-12) / 127
        code = (part / scale[:, None]).round().to(torch.int8)
        codes.append(code.view(-1, 16, part.shape[1] // 32, 32).transpose(1, 2))
        scales.append(scale)
    return {
        "codes": torch.cat(codes), "scales": torch.cat(scales),
        "levels": torch.empty(0, device=weight.device),
    }  # fmt: skip


def packed(codes: Tensor) -> Tensor:
    """Codes [out, in] below 16 → [out/16, in/32, 4, 32, 2]: the digits of 16 bits are 4 rows."""
    digits = codes.view(len(codes) // 16, 4, 4, -1, 32).permute(0, 3, 1, 4, 2)
    return digits[..., 0::2] | digits[..., 1::2] << 4


def unpacked(packed: Tensor) -> Tensor:
    """The codes [out, in] again."""
    digits = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)  # [rows, columns, 4, 32, 4]
    return digits.permute(0, 2, 4, 1, 3).flatten(3).flatten(0, 2)
