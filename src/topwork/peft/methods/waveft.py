"""WaveFT (arXiv:2505.12532): the change of the weight is a few trained wavelet coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.targets import by_pattern


@dataclass(kw_only=True)
class WaveFTConfig(LayerConfig):
    """scaling · the inverse Haar transform of `n_frequency` coefficients at random places."""

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    """"db1" or "haar", which are one."""
    use_idwt: bool = True
    """False: the coefficients are entries of the change themselves."""
    random_loc_seed: int = 777
    """The seed of the places, the same for all layers of one shape."""
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    """Share the coefficients out by the sizes of the layers."""
    bias: str = "none"
    init_weights: bool = True
    """Start at zero; False: near it."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "WAVEFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_frequency", self.n_frequency, 1)
        one_of("bias", self.bias, ("none", "all", "waveft_only"))
        if self.use_idwt and self.wavelet_family not in ("db1", "haar"):
            raise ConfigError(
                f"wavelet_family={self.wavelet_family!r} is not supported: only the shortest, "
                "'db1', changes no entry beyond its pair; use_idwt=False needs none"
            )


class WaveFT(Graft):
    USUAL = usual.WAVEFT
    config: WaveFTConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        inputs, outputs, config = self.site.inputs, self.site.outputs, self.config
        count = self._count()
        if count > inputs * outputs:
            raise ConfigError(
                f"n_frequency={count} is more than the {inputs}x{outputs} of {self.path}"
            )
        generator = torch.Generator().manual_seed(config.random_loc_seed)
        order = torch.randperm(inputs * outputs, generator=generator)[:count]
        self.places = (
            (order // inputs).to(self.layer.device),
            (order % inputs).to(self.layer.device),
        )
        spectrum = self.empty(count)
        spectrum = spectrum.zero_() if config.init_weights else spectrum.normal_(std=0.01)
        return {"waveft_spectrum": nn.Parameter(spectrum)}

    def _count(self) -> int:
        config = self.config
        if not config.proportional_parameters:
            return by_pattern(config.n_frequency_pattern, self.path, config.n_frequency)
        sizes = [site.inputs * site.outputs for _, site in self.shared.layers]
        budget = config.n_frequency * len(sizes)
        own = self.site.inputs * self.site.outputs
        return max(1, round(own / sum(sizes) * budget))

    def delta(self) -> Tensor:
        spectrum, (rows, columns) = self["waveft_spectrum"].float(), self.places
        inputs, outputs = self.site.inputs, self.site.outputs
        if not self.config.use_idwt:
            flat = spectrum.new_zeros(outputs, inputs)
            return flat.index_put((rows, columns), spectrum) * self.config.scaling
        dense = spectrum.new_zeros(outputs + outputs % 2, inputs + inputs % 2)
        dense = dense.index_put((rows.to(dense.device), columns.to(dense.device)), spectrum)
        return from_haar(dense)[:outputs, :inputs] * self.config.scaling


def from_haar(dense: Tensor) -> Tensor:
    """The matrix whose means, differences across rows, across columns and across both are the
    quarters of `dense` (top left, top right, bottom left, bottom right)."""
    pair = dense.new_tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)  # mean, difference
    quarters = dense.view(2, dense.shape[0] // 2, 2, -1)
    return torch.einsum("viuj,up,vq->ipjq", quarters, pair, pair).reshape(dense.shape)


CONFIG = WaveFTConfig
GRAFT = WaveFT
