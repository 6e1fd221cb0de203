"""FourierFT (arXiv:2405.03003): the change of the weight is a few trained Fourier coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.targets import by_pattern


@dataclass(kw_only=True)
class FourierFTConfig(LayerConfig):
    """scaling · Re IFFT₂ of a spectrum with `n_frequency` entries at random places."""

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    """The seed of the places, the same for all layers of one shape."""
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    bias: str = "none"
    init_weights: bool = False
    """Start at zero; False: normal."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "FOURIERFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_frequency", self.n_frequency, 1)
        one_of("bias", self.bias, ("none", "all", "fourier_only"))


class FourierFT(Graft):
    config: FourierFTConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, config = self.site, self.config
        count = by_pattern(config.n_frequency_pattern, self.path, config.n_frequency)
        if count > site.inputs * site.outputs:
            raise ConfigError(
                f"n_frequency={count} is more than the {site.inputs}x{site.outputs} of {self.path}"
            )
        generator = torch.Generator().manual_seed(config.random_loc_seed or 0)
        order = torch.randperm(site.inputs * site.outputs, generator=generator)
        self.places = order[:count].to(self.layer.device)
        spectrum = self.empty(count)
        spectrum = spectrum.zero_() if config.init_weights else spectrum.normal_()
        return {"fourierft_spectrum": nn.Parameter(spectrum)}

    def delta(self) -> Tensor:
        spectrum, site = self["fourierft_spectrum"].float(), self.site
        flat = spectrum.new_zeros(site.outputs * site.inputs)
        flat = flat.index_put((self.places.to(flat.device),), spectrum)
        return torch.fft.ifft2(flat.view(site.outputs, site.inputs)).real * self.config.scaling


CONFIG = FourierFTConfig
GRAFT = FourierFT
