"""GraLoRA (arXiv:2505.20355): a low-rank change for each of k x k blocks of the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.tensors import Matrix


@dataclass(kw_only=True)
class GraloraConfig(LayerConfig):
    """s · blocks Bⱼₙ Aₙⱼ of rank r/k, s = alpha/(r + hybrid_r); and a plain term of `hybrid_r`."""

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    """Into how many pieces inputs and outputs are cut."""
    bias: str = "none"
    init_weights: bool = True
    """B starts at zero; False: at random."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "GRALORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("hybrid_r", self.hybrid_r, 0)
        at_least("gralora_k", self.gralora_k, 1)
        a_share("gralora_dropout", self.gralora_dropout)
        one_of("bias", self.bias, ("none", "all", "gralora_only"))
        if self.r % self.gralora_k:
            raise ConfigError(f"gralora_k={self.gralora_k} does not divide r={self.r}")


class Gralora(Graft):
    config: GraloraConfig

    @property
    def scale(self) -> float:
        return self.config.alpha / (self.config.r + self.config.hybrid_r)

    def create(self) -> dict[str, Tensor | nn.Module]:
        k, site, config = self.config.gralora_k, self.site, self.config
        if site.inputs % k or site.outputs % k:
            raise ConfigError(
                f"gralora_k={k} does not divide the sides {site.inputs} and {site.outputs} of "
                f"{self.path}"
            )
        a, b = self.empty(k, config.r, site.inputs // k), self.empty(k, site.outputs // k, config.r)
        pairs = [(a[i], b[i]) for i in range(k)]
        made: dict[str, Tensor | nn.Module] = {}
        if config.hybrid_r:
            general = (
                self.empty(config.hybrid_r, site.inputs),
                self.empty(site.outputs, config.hybrid_r),
            )
            pairs.append(general)
            made = {f"gralora_{n}_general": Matrix(m) for n, m in zip("AB", general)}
        for low, up in pairs:
            nn.init.kaiming_uniform_(low, a=math.sqrt(5))
            nn.init.kaiming_uniform_(up, a=math.sqrt(5))
            if config.init_weights:
                up.zero_()
        blocks = {"gralora_A": a, "gralora_B": b}
        return made | {n: nn.Parameter(m.transpose(1, 2).contiguous()) for n, m in blocks.items()}

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """A [k in, in/k, k out, r/k] and B [k out, k in, r/k, out/k]."""
        k = self.config.gralora_k
        return self["gralora_A"].unflatten(2, (k, -1)), self["gralora_B"].unflatten(1, (k, -1))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (m.to(y.dtype) for m in self._blocks())
        x = F.dropout(x, self.config.gralora_dropout, self.layer.training)
        low = torch.einsum("...nd,ndjs->...jns", x.unflatten(-1, (self.config.gralora_k, -1)), a)
        added = torch.einsum("...jns,jnso->...jo", low, b).flatten(-2)
        if self.config.hybrid_r:
            general = F.linear(x, self["gralora_A_general"].to(y.dtype))
            added = added + F.linear(general, self["gralora_B_general"].to(y.dtype))
        return y + added * self.scale

    def delta(self) -> Tensor:
        made = torch.einsum("ndjs,jnso->jond", *self._blocks()).flatten(0, 1).flatten(1)
        if self.config.hybrid_r:
            made = made + self["gralora_B_general"] @ self["gralora_A_general"]
        return made * self.scale


CONFIG = GraloraConfig
GRAFT = Gralora
