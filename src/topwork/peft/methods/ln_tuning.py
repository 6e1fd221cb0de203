"""LN tuning (arXiv:2312.11420): the norms are trained whole, a copy for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    """Train the targeted modules themselves."""

    peft_type: str = "LN_TUNING"


class LNTuning(Graft):
    KINDS = ("linear", "conv", "embedding", "other")
    USUAL = usual.LNTUNING
    config: LNTuningConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        if not isinstance(getattr(self.base, "weight", None), nn.Parameter):
            raise ConfigError(f"LN_TUNING: {self.path} ({type(self.base).__name__}) has no weight")
        return {"ln_tuning_layers": copy.deepcopy(self.base).float()}

    @property
    def _copy(self) -> Any:
        return self.layer.ln_tuning_layers[self.name]

    def instead(self, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            made = self._copy
            if made.weight.dtype == x.dtype or not x.is_floating_point():
                return made(x)
            return made(x.to(made.weight.dtype)).to(x.dtype)

        return run

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        made = self._copy
        own = getattr(made, "bias", None)
        trained = made.weight.t() if self.site.transposed else made.weight
        return trained.float(), None if own is None else own.float()


CONFIG = LNTuningConfig
GRAFT = LNTuning
