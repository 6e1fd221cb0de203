"""SHiRA (arXiv:2406.13175): a sparse set of the weight's entries is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.methods._entries import changed_linear


@dataclass(kw_only=True)
class ShiraConfig(LayerConfig):
    """r · (in + out) entries at random places, as many as LoRA of rank r has parameters."""

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    """The seed of the places; they are written with the adapter."""
    init_weights: bool = True
    """Start at zero; False: normal."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "SHIRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        one_of("mask_type", self.mask_type, ("random",))


class Shira(Graft):
    config: ShiraConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, config = self.site, self.config
        every, count = site.inputs * site.outputs, config.r * (site.inputs + site.outputs)
        if count > every:
            raise ConfigError(f"r={config.r} is more than the {every} entries of {self.path} allow")
        seed = config.random_seed
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        places = torch.randperm(every, generator=generator)[:count].sort().values
        rows, columns = places // site.inputs, places % site.inputs
        values = self.empty(count)
        values = values.zero_() if config.init_weights else values.normal_()
        indices = torch.stack([rows, columns]).to(torch.int32).to(self.layer.device)
        return {"shira_weight": nn.Parameter(values), "shira_indices": indices}

    def whole(self, x: Tensor) -> Tensor | None:
        rows, columns = self["shira_indices"].long()
        places = rows * self.site.inputs + columns
        return changed_linear(self.base, x, places, self["shira_weight"])

    def delta(self) -> Tensor:
        values, indices = self["shira_weight"], self["shira_indices"].long()
        zeros = values.new_zeros(self.site.outputs, self.site.inputs)
        return zeros.index_put((indices[0], indices[1]), values)


CONFIG = ShiraConfig
GRAFT = Shira
