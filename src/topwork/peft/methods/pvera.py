"""PVeRA (arXiv:2512.07703): VeRA whose low-rank activations are drawn from a learned normal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.methods.vera import projections
from topwork.peft.sites import Site


@dataclass(kw_only=True)
class PveraConfig(LayerConfig):
    """Λ_b B z, z normal with the mean and log-variance Λ_d A x; B and A frozen and shared."""

    r: int = 256
    projection_prng_key: int = 0
    """The seed of A and B."""
    save_projection: bool = True
    """Write A and B with the adapter, rather than draw them again from the seed."""
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True
    """Λ_b starts at zero; False: both are random."""
    sample_at_inference: bool = False
    """Draw z outside training too, rather than take its mean."""
    generator_seed: int | None = None
    """Of the draws; None: torch's own generator."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "PVERA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("pvera_dropout", self.pvera_dropout)
        one_of("bias", self.bias, ("none", "all", "pvera_only"))


class Pvera(Graft):
    config: PveraConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        seed = self.config.generator_seed
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    @classmethod
    def share(cls, config: PveraConfig, layers: list[tuple[str, Site]]) -> dict[str, Tensor]:
        a, b = projections(config.projection_prng_key, 2 * config.r, config.r, layers)
        return {"pvera_A": a, "pvera_B": b}

    def create(self) -> dict[str, Tensor | nn.Module]:
        b, d = self.empty(self.site.outputs).fill_(1.0), self.empty(2 * self.config.r).normal_()
        if self.config.init_weights:
            b.zero_()
            d.fill_(self.config.d_initial)
        return {"pvera_lambda_b": nn.Parameter(b), "pvera_lambda_d": nn.Parameter(d)}

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Λ_d A [2r, in] and Λ_b B [out, r]."""
        a = self.shared["pvera_A"][:, : self.site.inputs].to(self.layer.device)
        b = self.shared["pvera_B"][: self.site.outputs].to(self.layer.device)
        return self["pvera_lambda_d"][:, None] * a, self["pvera_lambda_b"][:, None] * b

    @property
    def _draws(self) -> bool:
        return self.layer.training or self.config.sample_at_inference

    def term(self) -> ops.LoraTerm | None:
        if self._draws:
            return None
        a, b = self._matrices()
        return ops.LoraTerm(a[: self.config.r], b, 1.0)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (m.to(y.dtype) for m in self._matrices())
        x = F.dropout(x, self.config.pvera_dropout, self.layer.training)
        mean, spread = F.linear(x, a).chunk(2, -1)
        if self._draws:
            device = mean.device if self.generator is None else torch.device("cpu")
            noise = torch.randn(
                mean.shape, dtype=mean.dtype, device=device, generator=self.generator
            )
            mean = mean + noise.to(mean.device) * (spread / 2).exp()
        return y + F.linear(mean, b)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a[: self.config.r]


CONFIG = PveraConfig
GRAFT = Pvera
