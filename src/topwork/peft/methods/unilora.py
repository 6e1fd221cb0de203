"""Uni-LoRA (arXiv:2506.00799): every entry of all A and B is one of few trained numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.sites import Site


@dataclass(kw_only=True)
class UniLoraConfig(LayerConfig):
    """B A with entries θ[i]/√n for random i, n being how often θ[i] is used in the model."""

    r: int = 4
    proj_seed: int = 42
    """The seed of which entry takes which number."""
    theta_d_length: int = 256
    """How many numbers are trained."""
    unilora_dropout: float = 0.0
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    """θ starts uniform within the bound; False: normal."""
    save_indices: bool = False
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "UNILORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("theta_d_length", self.theta_d_length, 1)
        a_share("unilora_dropout", self.unilora_dropout)
        one_of("bias", self.bias, ("none", "all", "unilora_only"))
        if self.save_indices:
            raise ConfigError("save_indices=True is refused: the indices follow from proj_seed")


class UniLora(Graft):
    config: UniLoraConfig

    @classmethod
    def share(cls, config: UniLoraConfig, layers: list[tuple[str, Site]]) -> dict[str, Tensor]:
        count, length = sum(size(config, site) for _, site in layers), config.theta_d_length
        bound = config.init_theta_d_bound
        theta = torch.empty(length)
        theta = theta.uniform_(-bound, bound) if config.init_weights else theta.normal_()
        places = assignment(count, length, config.proj_seed)
        often = torch.bincount(places, minlength=length)
        factors = often.clamp(min=1).float().rsqrt() * (often > 0)
        return {
            "unilora_theta_d": nn.Parameter(theta), "_unilora_places": places,
            "_unilora_factors": factors,
        }  # fmt: skip

    def create(self) -> dict[str, Tensor | nn.Module]:
        at = 0
        for path, site in self.shared.layers:
            if path == self.path:
                break
            at += size(self.config, site)
        self.start = at
        return {}

    def _matrices(self) -> tuple[Tensor, Tensor]:
        r, site = self.config.r, self.site
        scaled = self.shared["unilora_theta_d"] * self.shared["_unilora_factors"]
        part = self.shared["_unilora_places"][self.start : self.start + size(self.config, site)]
        a, b = scaled[part].to(self.layer.device).split((r * site.inputs, r * site.outputs))
        return a.view(r, -1), b.view(-1, r)

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), 1.0, self.config.unilora_dropout)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a


def size(config: UniLoraConfig, site: Site) -> int:
    """How many entries A and B of one layer have."""
    return config.r * (site.inputs + site.outputs)


def assignment(count: int, length: int, seed: int) -> Tensor:
    """`count` indices below `length`, each as often as the others but for one, shuffled."""
    rng = np.random.default_rng(seed)
    even = np.repeat(np.arange(length), count // length)
    rest = count % length
    if rest:
        even = np.concatenate([even, rng.choice(length, size=rest, replace=False)])
    rng.shuffle(even)
    return torch.as_tensor(even, dtype=torch.long)


CONFIG = UniLoraConfig
GRAFT = UniLora
