"""HRA (arXiv:2405.17484): the weight's inputs are reflected by r Householder matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class HRAConfig(LayerConfig):
    """W H₁ … Hᵣ, Hᵢ = I - 2 uᵢ uᵢᵀ / ‖uᵢ‖²."""

    r: int = 8
    apply_GS: bool = False  # noqa: N815
    """Make the directions orthogonal first."""
    bias: str = "none"
    init_weights: bool = True
    """Pairs of equal directions, which cancel (for an even r); False: all random."""
    peft_type: str = "HRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        one_of("bias", self.bias, ("none", "all", "hra_only"))


class Hra(Graft):
    KINDS = ("linear", "conv")
    config: HRAConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, r = self.site, self.config.r
        if site.groups > 1:
            raise ConfigError(f"HRA does not go to {self.path}, a convolution in groups")
        inputs = site.inputs * math.prod(site.kernel)
        paired = self.config.init_weights and r % 2 == 0
        u = self.empty(inputs, r // 2 if paired else r)
        nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        return {"hra_u": nn.Parameter(u.repeat_interleave(2, 1) if paired else u)}

    def _factors(self) -> tuple[Tensor, Tensor]:
        """U [in, r] and S [r, r] with H₁ … Hᵣ = I - U S Uᵀ (the compact form of the product)."""
        u = self["hra_u"]
        if self.config.apply_GS:
            u = torch.linalg.qr(u).Q
            return u, 2 * torch.eye(u.shape[1], device=u.device)
        u = u / u.norm(dim=0)
        inverse = (u.t() @ u).triu(1) + torch.eye(u.shape[1], device=u.device) / 2
        eye = torch.eye(u.shape[1], device=u.device)
        return u, torch.linalg.solve_triangular(inverse, eye, upper=True)

    def before(self, x: Tensor) -> Tensor:
        if self.site.kind == "conv":
            return x
        u, s = (m.to(x.dtype) for m in self._factors())
        return x - x @ u @ s.t() @ u.t()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return super().after(x, y) if self.site.kind == "conv" else y

    def delta(self) -> Tensor:
        weight = self.weight.flatten(1)
        u, s = self._factors()
        return (-(weight @ u) @ s @ u.t()).view(self.weight.shape)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        flat = weight.flatten(1)
        u, s = self._factors()
        return (flat - flat @ u @ s @ u.t()).view(weight.shape), bias


CONFIG = HRAConfig
GRAFT = Hra
