"""PEANuT (arXiv:2410.01870): the change of the weight is a small net's output for the weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.tensors import Matrix

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "linear": lambda x: x,
}


@dataclass(kw_only=True)
class PeanutConfig(LayerConfig):
    """s · (B f(… f(A Wᵀ)))ᵀ, with `depth` pairs of layers that pass by each other."""

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True
    """B starts at zero; False: at random."""
    peft_type: str = "PEANUT"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("depth", self.depth, 0)
        one_of("act_fn", self.act_fn, tuple(ACTIVATIONS))


class Peanut(Graft):
    config: PeanutConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        r, site, depth = self.config.r, self.site, self.config.depth

        def drawn(rows: int, columns: int) -> Matrix:
            weight = self.empty(rows, columns)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            return Matrix(weight)

        b = drawn(site.outputs, r)
        if self.config.init_weights:
            nn.init.zeros_(b.weight)
        layers = {
            f"peanut_{name}": nn.ModuleList(drawn(r, r) for _ in range(depth))
            for name in ("encoders", "decoders")
        }
        return {"peanut_A": drawn(r, site.outputs), "peanut_B": b, **layers}

    def delta(self) -> Tensor:
        return self._of(self.weight)

    def _of(self, weight: Tensor) -> Tensor:
        act = ACTIVATIONS[self.config.act_fn]
        made = act(F.linear(weight.t(), self["peanut_A"]))  # [in, r]
        passed = []
        for layer in self["peanut_encoders"]:
            passed.append(made)
            made = act(F.linear(made, layer.weight.float()))
        for layer, past in zip(self["peanut_decoders"], reversed(passed)):
            made = act(F.linear(made, layer.weight.float())) + past
        return F.linear(made, self["peanut_B"]).t() * self.config.scaling


CONFIG = PeanutConfig
GRAFT = Peanut
