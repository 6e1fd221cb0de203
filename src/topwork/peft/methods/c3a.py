"""C3A (arXiv:2407.19342): the change of the weight is made of circulant blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.targets import by_pattern


@dataclass(kw_only=True)
class C3AConfig(LayerConfig):
    """Circulant blocks of one trained vector each, applied by FFT."""

    block_size: int = 256
    """Must divide the sides of every layer."""
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    bias: str = "none"
    init_weights: bool | str = "xavier_uniform"
    """True: zero; "gaussian", "kaiming_uniform", "xavier_uniform" (False too)."""
    peft_type: str = "C3A"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("block_size", self.block_size, 1)
        one_of("bias", self.bias, ("none", "all", "c3a_only"))
        kinds = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")
        one_of("init_weights", self.init_weights, kinds)


class C3A(Graft):
    config: C3AConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, kind = self.site, self.config.init_weights
        size = by_pattern(self.config.block_size_pattern, self.path, self.config.block_size)
        if site.inputs % size or site.outputs % size:
            raise ConfigError(
                f"block_size={size} does not divide the sides {site.inputs} and {site.outputs} "
                f"of {self.path}"
            )
        kernel = self.empty(site.outputs // size, site.inputs // size, size).zero_()
        if kind == "gaussian":
            kernel.normal_()
        elif kind is not True:
            fan = site.inputs if kind == "kaiming_uniform" else (site.inputs + site.outputs) / 6
            bound = 1 / math.sqrt(fan)
            kernel.uniform_(-bound, bound)
        return {"c3a_kernel": nn.Parameter(kernel)}

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self._applied(x.float()).to(y.dtype)

    def _applied(self, x: Tensor) -> Tensor:
        """Each block correlates its part of x with its vector; outputs sum over the parts."""
        kernel = self["c3a_kernel"].float()
        parts = torch.fft.ifft(x.unflatten(-1, (-1, kernel.shape[-1])))
        mixed = torch.einsum("...nb,mnb->...mb", parts, torch.fft.fft(kernel))
        return torch.fft.fft(mixed).real.flatten(-2) / self.site.inputs

    def delta(self) -> Tensor:
        return self._applied(torch.eye(self.site.inputs, device=self.layer.device)).t()


CONFIG = C3AConfig
GRAFT = C3A
