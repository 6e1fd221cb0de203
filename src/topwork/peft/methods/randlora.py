"""RandLoRA (arXiv:2502.00987): full-rank updates, a trained sum of frozen random low-rank ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.sites import Site


@dataclass(kw_only=True)
class RandLoraConfig(LayerConfig):
    """Σⱼ Bⱼ Λⱼ A Γⱼ with all Bⱼ and A frozen and shared."""

    r: int = 32
    randlora_alpha: float = 640
    randlora_dropout: float = 0.0
    projection_prng_key: int = 0
    """The seed of the random matrices."""
    save_projection: bool = True
    """Write the random matrices with the adapter, rather than draw them again from the seed."""
    sparse: bool = False
    """The random matrices hold -1, 0, 1 at 1:4:1."""
    very_sparse: bool = False
    """… at 1 : 2√D - 2 : 1, D the smaller side of the largest layer."""
    bias: str = "none"
    init_weights: bool = True
    """Λ starts at zero; False: random."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "RANDLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("randlora_dropout", self.randlora_dropout)
        one_of("bias", self.bias, ("none", "all", "randlora_only"))


class RandLora(Graft):
    config: RandLoraConfig

    @classmethod
    def share(cls, config: RandLoraConfig, layers: list[tuple[str, Site]]) -> dict[str, Tensor]:
        inputs, outputs = max(s.inputs for _, s in layers), max(s.outputs for _, s in layers)
        long, short = max(inputs, outputs), min(inputs, outputs)
        bases = math.ceil(short / config.r)
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        if config.sparse or config.very_sparse:
            odds = math.sqrt(short) if config.very_sparse else 3
            a = _signs((config.r, 1, short), odds, generator)
            b = _signs((long, bases, config.r), odds, generator)
        else:
            a = _dense((config.r, 1, short), generator)
            b = torch.cat([_dense((long, 1, config.r), generator) for _ in range(bases)], 1)
        return {"randlora_A": (a / a.std()).float(), "randlora_B": (b / b.std()).float()}

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, r = self.site, self.config.r
        short, long = sorted((site.inputs, site.outputs))
        bases = math.ceil(short / r)
        mix = self.empty(r, bases)
        mix = mix.zero_() if self.config.init_weights else mix.normal_()
        size = max(bases, short) if self.config.init_weights else long
        gain = self.empty(bases, short).fill_(1 / size)
        return {"randlora_lambda": nn.Parameter(mix), "randlora_gamma": nn.Parameter(gain)}

    def _matrices(self) -> tuple[Tensor, Tensor]:
        mix, gain = self["randlora_lambda"], self["randlora_gamma"]  # [r, N], [N, short]
        bases, short = gain.shape
        long = max(self.site.inputs, self.site.outputs)
        a = self.shared["randlora_A"][:, :, :short].to(gain.device)
        b = self.shared["randlora_B"][:long, :bases].flatten(1).to(gain.device)
        a = (mix[:, :, None] * a * gain).flatten(0, 1)  # [r·N, short]
        return (a, b) if short == self.site.inputs else (b.t(), a.t())

    @property
    def scale(self) -> float:
        return self.config.randlora_alpha / self.config.r

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), self.scale, self.config.randlora_dropout)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a * self.scale


def _dense(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform, drawn in bf16 as the peer does so that a seed gives the same matrices."""
    drawn = torch.empty(shape, dtype=torch.bfloat16)
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, ...], odds: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(shape, generator=generator)
    return (drawn > 1 - 0.5 / odds).float() - (drawn < 0.5 / odds).float()


CONFIG = RandLoraConfig
GRAFT = RandLora
