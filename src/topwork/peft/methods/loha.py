"""LoHa (FedPara, arXiv:2108.06098): the elementwise product of two low-rank products."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from topwork.peft.methods._lycoris import Lycoris, LycorisConfig, with_core


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """scale · (A₁ B₁) ⊙ (A₂ B₂)."""

    init_weights: bool = True
    """One factor starts at zero; False: none does."""
    peft_type: str = "LOHA"


class LoHa(Lycoris):
    config: LoHaConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        r, outputs, kernel = self.r, self.site.outputs, self.site.kernel
        made: dict[str, Tensor | nn.Module] = {}
        for i in ("1", "2"):
            if self.core:
                made[f"hada_t{i}"] = self.empty(r, r, *kernel, *(1,) * (2 - len(kernel)))
                made[f"hada_w{i}_a"] = self.empty(r, outputs)
                made[f"hada_w{i}_b"] = self.empty(r, self.inputs)
            else:
                made[f"hada_w{i}_a"] = self.empty(outputs, r)
                made[f"hada_w{i}_b"] = self.empty(r, self.inputs * math.prod(kernel))
        for name, tensor in made.items():
            assert isinstance(tensor, Tensor)
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            if name == "hada_w2_b" and self.config.init_weights:
                tensor.zero_()
            made[name] = nn.Parameter(tensor)
        return made

    def delta(self) -> Tensor:
        return self.scaled(self._product("1") * self._product("2"))

    def _product(self, i: str) -> Tensor:
        a, b = self[f"hada_w{i}_a"], self[f"hada_w{i}_b"]
        return with_core(self[f"hada_t{i}"], a, b) if self.core else a @ b


CONFIG = LoHaConfig
GRAFT = LoHa
