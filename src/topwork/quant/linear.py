"""Weight-only quantisation: codes and scales in place of a linear's weight, activations untouched.

    int8   one scale per output row
    int4   16 even levels, one scale per `group` input columns
    nf4    16 levels at the quantiles of a normal distribution (arXiv:2305.14314), as int4

Few rows go through the native kernels (`ops/native/decode.c`), which read the codes; many rows
through the weight as it is dequantised for the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class QuantisedLinear(nn.Module):
    """x Wᵀ + b with W [out, in] in `kind`. Made from a linear's weight by `of`."""

    # Rows stand in blocks of 16 and columns in blocks of 32, as the kernels read them.
    codes: Tensor  # int8 [out/16, in/32, 16, 32], or uint8 [out/16, in/32, 4, 32, 2]
    scales: Tensor  # fp32 [out], or bf16 [out/16, in/group, 16]
    levels: Tensor  # fp32 [16] (int8: empty)

    def __init__(
        self, inputs: int, outputs: int, kind: str, group: int = 32, bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32, device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"kind={kind!r} is not known{nearest(kind, KINDS)}; one of {KINDS}")
        if outputs % 16 or inputs % 32:
            raise ConfigError(
                f"a weight [{outputs}, {inputs}] cannot be quantised: 16 must divide its rows and "
                "32 its columns"
            )
        if kind in LEVELS and (group % 32 or inputs % group):
            raise ConfigError(
                f"group={group} must be a multiple of 32 that divides the {inputs} input columns"
            )
        self.in_features, self.out_features = inputs, outputs
        self.kind, self.group = kind, group
        self.dtype = dtype
        rows, columns, four = outputs // 16, inputs // 32, kind in LEVELS
        codes = (
            torch.zeros(rows, columns, 4, 32, 2, dtype=torch.uint8, device=device)
            if four else torch.zeros(rows, columns, 16, 32, dtype=torch.int8, device=device)
        )  # fmt: skip
        scales = (
            torch.zeros(rows, inputs // group, 16, dtype=torch.bfloat16, device=device)
            if four else torch.zeros(outputs, device=device)
        )  # fmt: skip
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("levels", torch.tensor(LEVELS.get(kind, []), device=device))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, kind: str, group: int = 32) -> QuantisedLinear:
        """The linear with its weight quantised."""
        weight = linear.weight
        made = cls(
            linear.in_features, linear.out_features, kind, group, linear.bias, weight.dtype,
            weight.device,
        )  # fmt: skip
        made.set_weight(weight)
        return made.train(linear.training)

    # -- the protocol of a linear ----------------------------------------------------------------

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantise `weight` [out, in] into the codes; each scale is the best of several."""
        for start in range(0, len(weight), 4096):
            part = weight[start : start + 4096].float()
            blocks = slice(start // 16, start // 16 + len(part) // 16)
            if self.kind == "int8":
                codes, self.scales[start : start + 4096] = _rounded8(part)
                self.codes[blocks] = codes.view(-1, 16, self.in_features // 32, 32).transpose(1, 2)
            else:
                codes, scales = self._rounded4(part)
                self.codes[blocks] = _packed(codes)
                self.scales[blocks] = scales.view(-1, 16, scales.shape[1]).transpose(1, 2)

    def dequantised_weight(self) -> Tensor:
        """W [out, in] in the dtype that it had."""
        if self.kind == "int8":
            codes = self.codes.transpose(1, 2).reshape(self.out_features, self.in_features)
            return (codes * self.scales[:, None]).to(self.dtype)
        values = self.levels[_unpacked(self.codes).int()].unflatten(1, (-1, self.group))
        scales = self.scales.transpose(1, 2).reshape(self.out_features, -1, 1)
        return (values * scales.float()).flatten(1).to(self.dtype)

    def native_weight(self) -> Weight:
        """The weight as the native kernels take it."""
        four = self.kind in LEVELS
        return Weight(
            self.codes, self.out_features, self.in_features, "code4" if four else "int8",
            self.scales, self.levels if four else None, self.group, self.bias,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, group={self.group}"

    def _rounded4(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scales [out, in/group] with the least squared error of a few."""
        groups = weight.view(len(weight), -1, self.group)
        far = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        # int4 has one level more below zero: the farthest value goes there, whatever its sign.
        whole = far / -8 if self.kind == "int4" else far.abs()
        best = torch.full_like(whole, float("inf"))
        scales = torch.zeros_like(whole, dtype=torch.bfloat16)
        codes = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
        edges = (self.levels[1:] + self.levels[:-1]) / 2
        for share in (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74):
            scale = (whole * share).to(torch.bfloat16)
            safe = torch.where(scale == 0, 1.0, scale.float())[..., None]
            tried = torch.bucketize(groups / safe, edges)
            error = (self.levels[tried] * safe - groups).pow(2).sum(-1)
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


class _Product(torch.autograd.Function):
    """x Wᵀ, which keeps nothing of the dequantised weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return F.linear(x, layer.dequantised_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy @ ctx.layer.dequantised_weight().to(dy.dtype), None


def quantise(
    model: nn.Module,
    kind: str = "int4",
    *,
    group: int = 32,
    head: str | None = "int8",
    skip: Callable[[str], bool] = lambda path: False,
) -> nn.Module:
    """Replace the linears of `model` in place, except those whose path `skip` accepts.

    `head`: the kind of the output head (`lm_head`), which keeps its embedding where they are tied;
    None leaves it as it is. Linears of a shape that does not go into blocks are left too.
    """
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or skip(path):
            continue
        chosen = head if path.rpartition(".")[2] == "lm_head" else kind
        columns = group if chosen in LEVELS else 32
        if chosen is None or module.in_features % columns or module.out_features % 16:
            continue
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, QuantisedLinear.of(module, chosen, group))
    tied = getattr(model, "tied", None)
    if tied:
        model.tied = {}  # type: ignore[assignment]
    return model
