"""(IA)³ (arXiv:2205.05638): l ⊙ (W x + b) on most layers, W (l ⊙ x) + b on feed-forward ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import targets, usual
from topwork.peft.config import LayerConfig
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class IA3Config(LayerConfig):
    """One learned factor per channel."""

    feedforward_modules: str | list[str] | None = None
    """The targets whose input is scaled rather than their output; a regular expression or names.
    None, where target_modules is not given either: the usual ones of the family."""
    init_ia3_weights: bool = True
    """Start at one; False: normal."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "IA3"

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, outer = self.feedforward_modules, self.target_modules
        if isinstance(inner, (set, tuple)):
            self.feedforward_modules = inner = sorted(inner)
        if isinstance(inner, list) and isinstance(outer, list):
            strangers = sorted(set(inner) - set(outer))
            if strangers:
                raise ConfigError(f"feedforward_modules {strangers} are not among target_modules")


class Ia3(Graft):
    KINDS = ("linear", "conv")
    USUAL = usual.IA3
    config: IA3Config

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.on_input = self._is_feedforward()

    def _is_feedforward(self) -> bool:
        inner = self.config.feedforward_modules
        if isinstance(inner, str):
            return re.fullmatch(inner, self.path) is not None
        return any(targets.ends(self.path, name) for name in inner or [])

    @classmethod
    def settle(cls, config: IA3Config, model: nn.Module) -> IA3Config:
        if config.feedforward_modules is None:
            named = config.target_modules is not None
            inner = [] if named else targets.usual_of(model, usual.IA3_FEEDFORWARD)
            config = replace(config, feedforward_modules=inner)
        return super().settle(config, model)

    def create(self) -> dict[str, Tensor | nn.Module]:
        site = self.site
        if site.kind == "conv":
            channels = site.inputs if self.on_input else site.outputs
            shape = (1, channels, *(1,) * len(site.kernel))
        else:
            shape = (1, site.inputs) if self.on_input else (site.outputs, 1)
        factor = self.empty(*shape)
        factor = factor.fill_(1.0) if self.config.init_ia3_weights else factor.normal_()
        return {"ia3_l": nn.Parameter(factor)}

    def before(self, x: Tensor) -> Tensor:
        return x * self.over(self["ia3_l"], x) if self.on_input else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.on_input else y * self.over(self["ia3_l"], y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self["ia3_l"].float().flatten()
        rest = (1,) * (weight.dim() - 2)
        if not self.on_input:
            bias = None if bias is None else bias * factor
            return weight * factor.view(-1, 1, *rest), bias
        # A grouped convolution's weight has only its group's inputs.
        per_group = factor.view(self.site.groups, 1, -1, *rest)
        grouped = weight.view(self.site.groups, -1, *weight.shape[1:]) * per_group
        return grouped.view(weight.shape), bias


CONFIG = IA3Config
GRAFT = Ia3
