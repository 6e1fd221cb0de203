"""DeLoRA (arXiv:2503.18225): LoRA whose directions are normalised, with a trained strength."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from topwork import ops
from topwork.peft import sites
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.targets import by_pattern


@dataclass(kw_only=True)
class DeloraConfig(LayerConfig):
    """λ/r Σᵢ bᵢ aᵢᵀ / (‖bᵢ‖ ‖aᵢ‖), each input by the norm of its column of W."""

    r: int = 8
    delora_lambda: float = 15
    """The strength at the start."""
    module_dropout: float = 0.0
    """Dropout on the inputs."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    init_weights: bool = True
    """B starts at zero; False: both random."""
    peft_type: str = "DELORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("module_dropout", self.module_dropout)
        one_of("bias", self.bias, ("none", "all", "delora_only"))


class Delora(Graft):
    config: DeloraConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.r = by_pattern(self.config.rank_pattern, self.path, self.config.r)

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, site = self.config, self.site
        a, b = self.empty(self.r, site.inputs), self.empty(site.outputs, self.r)
        for matrix in (a, b):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if config.init_weights:
            b.zero_()
        strength = by_pattern(config.lambda_pattern, self.path, config.delora_lambda)
        return {
            "delora_A": nn.Parameter(a),
            "delora_B": nn.Parameter(b),
            "delora_lambda": nn.Parameter(self.empty(1).fill_(strength)),
            "delora_w_norm": sites.read_weight(self.base).detach().float().norm(dim=0),
        }

    def _matrices(self) -> tuple[Tensor, Tensor]:
        a, b = self["delora_A"], self["delora_B"]
        norms = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
        scale = self["delora_lambda"] / self.r / norms
        return scale[:, None] * a * self["delora_w_norm"], b

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), 1.0, self.config.module_dropout)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a


CONFIG = DeloraConfig
GRAFT = Delora
