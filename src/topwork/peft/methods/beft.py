"""BEFT: a bias is added to the layer's own, by default the value projection's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class BeftConfig(LayerConfig):
    """W x + b + a trained bias; with every layer targeted this is BitFit (arXiv:2106.10199)."""

    init_weights: bool = True
    """Start at zero; False: normal."""
    peft_type: str = "BEFT"


class Beft(Graft):
    USUAL = usual.BEFT
    config: BeftConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        bias = self.empty(1, self.site.outputs)
        return {
            "beft_bias": nn.Parameter(bias.zero_() if self.config.init_weights else bias.normal_())
        }

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.over(self["beft_bias"], y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            raise ConfigError(f"{self.path} has no bias that BEFT's could be merged into")
        return weight, bias + self["beft_bias"].float().flatten()


CONFIG = BeftConfig
GRAFT = Beft
