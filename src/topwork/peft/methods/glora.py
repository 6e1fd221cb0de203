"""GLoRA (arXiv:2306.07967): weight and bias scaled and shifted: W + W ⊙ A + B and
b + b ⊙ D + E + W C."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft

MATRICES = ("lora", "vector", "constant", "none")
FACTORS = ("lora", "vector", "none")
SHIFTS = ("constant", "none", "vector")


@dataclass(kw_only=True)
class GloraConfig(LayerConfig):
    """Each of the five is a low-rank matrix, a vector, one number, or none."""

    r: int = 8
    config_A_B: str = "lora"  # noqa: N815
    config_C: str = "lora"  # noqa: N815
    config_D_E: str = "constant"  # noqa: N815
    bias: str = "none"
    init_weights: bool = True
    """All start at zero; False: at random."""
    peft_type: str = "GLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        one_of("config_A_B", self.config_A_B, MATRICES)
        one_of("config_C", self.config_C, FACTORS)
        one_of("config_D_E", self.config_D_E, SHIFTS)
        one_of("bias", self.bias, ("none", "all", "glora_only"))


class Part(nn.Module):
    """One of the five, under the names that files have."""

    def __init__(self, graft: Graft, kind: str, shape: tuple[int, ...], r: int, zero: bool) -> None:
        super().__init__()
        if kind == "none":
            self.register_buffer("zeros", graft.empty(*shape).zero_())
        elif kind == "lora":
            up, down = graft.empty(shape[0], r), graft.empty(r, shape[1])
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            nn.init.kaiming_uniform_(up, a=math.sqrt(5))
            self.Xd = nn.Parameter(up.zero_() if zero else up)
            self.Xu = nn.Parameter(down)
        else:
            column = (shape[0], 1) if len(shape) == 2 else shape
            x = graft.empty(*(column if kind == "vector" else (1,))).normal_(std=0.02)
            self.X = nn.Parameter(x.zero_() if zero else x)

    def forward(self) -> Tensor:
        if hasattr(self, "Xd"):
            return self.Xd @ self.Xu
        return self.X if hasattr(self, "X") else self.get_buffer("zeros")


class Glora(Graft):
    config: GloraConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, config = self.site, self.config
        biased = getattr(self.base, "bias", None) is not None
        whole, column = (site.outputs, site.inputs), (site.inputs, 1)
        of_bias = (config.config_C, config.config_D_E) if biased else ("none", "none")
        kinds = {
            "A": (config.config_A_B, whole), "B": (config.config_A_B, whole),
            "C": (of_bias[0], column), "D": (of_bias[1], whole[:1]), "E": (of_bias[1], whole[:1]),
        }  # fmt: skip
        return {
            f"glora_{name}": Part(self, kind, shape, config.r, config.init_weights)
            for name, (kind, shape) in kinds.items()
        }

    def _changes(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b, c, d, e = (getattr(self.layer, f"glora_{n}")[self.name]().float() for n in "ABCDE")
        change = (weight * a + b).expand_as(weight)
        return change, None if bias is None else bias * d + e + (weight @ c).squeeze(-1)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        bias = getattr(self.base, "bias", None)
        weight, shift = self._changes(self.weight, None if bias is None else bias.detach().float())
        return y + F.linear(x, weight.to(y.dtype), None if shift is None else shift.to(y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change, shift = self._changes(weight, bias)
        return weight + change, bias if bias is None or shift is None else bias + shift


CONFIG = GloraConfig
GRAFT = Glora
