"""VeRA (arXiv:2310.11454): one pair of random matrices for all layers, scaled by vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.sites import Site


@dataclass(kw_only=True)
class VeraConfig(LayerConfig):
    """Λ_b B Λ_d A with B and A frozen and shared."""

    r: int = 256
    projection_prng_key: int = 0
    """The seed of A and B."""
    save_projection: bool = True
    """Write A and B with the adapter, rather than draw them again from the seed."""
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True
    """Λ_b starts at zero; False: both are random."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "VERA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("vera_dropout", self.vera_dropout)
        one_of("bias", self.bias, ("none", "all", "vera_only"))


class Vera(Graft):
    config: VeraConfig

    @classmethod
    def share(cls, config: VeraConfig, layers: list[tuple[str, Site]]) -> dict[str, Tensor]:
        a, b = projections(config.projection_prng_key, config.r, config.r, layers)
        return {"vera_A": a, "vera_B": b}

    def create(self) -> dict[str, Tensor | nn.Module]:
        if self.config.init_weights:
            b = self.empty(self.site.outputs).zero_()
            d = self.empty(self.config.r).fill_(self.config.d_initial)
        else:
            b, d = self.empty(self.site.outputs).fill_(1.0), self.empty(self.config.r).normal_()
        return {"vera_lambda_b": nn.Parameter(b), "vera_lambda_d": nn.Parameter(d)}

    def _matrices(self) -> tuple[Tensor, Tensor]:
        a = self.shared["vera_A"][:, : self.site.inputs].to(self.layer.device)
        b = self.shared["vera_B"][: self.site.outputs].to(self.layer.device)
        return self["vera_lambda_d"][:, None] * a, self["vera_lambda_b"][:, None] * b

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), 1.0, self.config.vera_dropout)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a


def projections(
    seed: int, inner: int, rank: int, layers: list[tuple[str, Site]]
) -> tuple[Tensor, Tensor]:
    """A [inner, in] and B [out, rank] for the widest of `layers`, drawn from `seed`."""
    inputs, outputs = max(s.inputs for _, s in layers), max(s.outputs for _, s in layers)
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6 / columns)  # He's uniform distribution
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw(inner, inputs), draw(outputs, rank)


CONFIG = VeraConfig
GRAFT = Vera
