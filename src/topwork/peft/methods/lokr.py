"""LoKr (LyCORIS, arXiv:2309.14859): a Kronecker product, of which either side may be low-rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.methods._lycoris import Lycoris, LycorisConfig, with_core


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """scale · W₁ ⊗ W₂."""

    decompose_both: bool = False
    """Let W₁ be low-rank too."""
    decompose_factor: int = -1
    """The size of W₁'s sides; -1: the divisor next to the square root."""
    rank_dropout_scale: bool = False
    init_weights: bool | str = True
    """W₁ starts at zero; "lycoris": W₂ does; False: neither."""
    peft_type: str = "LOKR"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (True, False, "lycoris"):
            raise ConfigError(f"init_weights={self.init_weights!r}; True, False or 'lycoris'")


def split(size: int, factor: int) -> tuple[int, int]:
    """Two divisors of `size`, the smaller first: near `factor`, or (-1) near the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= max(most, 1))
    return small, size // small


class LoKr(Lycoris):
    config: LoKrConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        factor = self.config.decompose_factor
        self.rows = split(self.site.outputs, factor)
        self.columns = split(self.inputs, factor)
        both = self.config.decompose_both
        self.whole1 = not (both and self.r < max(self.rows[0], self.columns[0]) / 2)
        self.whole2 = self.r >= max(self.rows[1], self.columns[1]) / 2

    def create(self) -> dict[str, Tensor | nn.Module]:
        r, kernel = self.r, self.site.kernel
        (l, k), (m, n) = self.rows, self.columns  # noqa: E741
        shapes: dict[str, tuple[int, ...]] = {}
        if self.whole1:
            shapes["lokr_w1"] = (l, m)
        else:
            shapes |= {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)}
        if self.whole2:
            shapes["lokr_w2"] = (k, n, *kernel)
        elif self.core:
            shapes["lokr_t2"] = (r, r, *kernel, *(1,) * (2 - len(kernel)))
            shapes |= {"lokr_w2_a": (r, k), "lokr_w2_b": (r, n)}
        else:
            shapes |= {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * math.prod(kernel))}
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}
        made: dict[str, Tensor | nn.Module] = {}
        for name, shape in shapes.items():
            tensor = self.empty(*shape)
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            if name in zero[self.config.init_weights]:
                tensor.zero_()
            made[name] = nn.Parameter(tensor)
        return made

    def delta(self) -> Tensor:
        w1 = self["lokr_w1"] if self.whole1 else self["lokr_w1_a"] @ self["lokr_w1_b"]
        if self.whole2:
            w2 = self["lokr_w2"]
        elif self.core:
            w2 = with_core(self["lokr_t2"], self["lokr_w2_a"], self["lokr_w2_b"])
        else:
            w2 = self["lokr_w2_a"] @ self["lokr_w2_b"]
        (_, k), (_, n) = self.rows, self.columns
        return self.scaled(torch.kron(w1.unsqueeze(-1), w2.reshape(k, n, -1).contiguous()))


CONFIG = LoKrConfig
GRAFT = LoKr
