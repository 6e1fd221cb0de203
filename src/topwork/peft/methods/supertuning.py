"""Super-Tuning (arXiv:2607.09287): the weight's largest (or smallest) entries are trained, beside a
low-rank change where that is wanted (Supra)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.config import LayerConfig, a_share, at_least
from topwork.peft.graft import Graft
from topwork.peft.methods._entries import changed_linear
from topwork.peft.tensors import Matrix


@dataclass(kw_only=True)
class SupertuningConfig(LayerConfig):
    """W with changes of 1 - `sparsity` of its entries, + s · B A of rank `r`."""

    sparsity: float = 0.99
    """Share of the entries that stay."""
    select_top: bool = True
    """Train the entries of the largest magnitude; False: of the smallest."""
    r: int | None = None
    """None: no low-rank change."""
    lora_alpha: float | None = None
    """s = lora_alpha/r; None: 2."""
    lora_dropout: float = 0.0
    """Dropout on the input of A."""
    init_weights: bool = True
    """Start at no change; False: at random."""
    save_precomputed_indices: bool = True
    """Write the entries' places. False: a loaded adapter finds them in the base again, which must
    be the very same."""
    peft_type: str = "SUPERTUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        a_share("sparsity", self.sparsity)
        a_share("lora_dropout", self.lora_dropout)
        if self.r is None:
            if self.lora_alpha is not None:
                raise ConfigError("lora_alpha has no meaning without r")
        else:
            at_least("r", self.r, 1)
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha


class Supertuning(Graft):
    config: SupertuningConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, weight = self.config, self.weight
        count = int(weight.numel() * (1 - config.sparsity))
        if count < 1:
            raise ConfigError(f"sparsity={config.sparsity} leaves no entry of {self.path} to train")
        places = torch.topk(weight.abs().flatten(), count, largest=config.select_top).indices
        values = self.empty(count)
        values = values.zero_() if config.init_weights else values.normal_()
        made: dict[str, Tensor | nn.Module] = {
            "supertuning_values": nn.Parameter(values),
            "supertuning_indices": places.to(torch.int32),
        }
        if config.r is not None:
            a, b = self.empty(config.r, self.site.inputs), self.empty(self.site.outputs, config.r)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            b = b.zero_() if config.init_weights else b
            made |= {"supertuning_lora_A": Matrix(a), "supertuning_lora_B": Matrix(b)}
        return made

    def saved(self) -> Iterable[tuple[str, Tensor]]:
        every = self.config.save_precomputed_indices
        return (item for item in super().saved() if every or item[0] != "supertuning_indices")

    @property
    def scale(self) -> float:
        return (self.config.lora_alpha or 0) / (self.config.r or 1)

    def whole(self, x: Tensor) -> Tensor | None:
        """One product with the changed weight, which is not kept for the backward pass."""
        places = self["supertuning_indices"].long()
        y = changed_linear(self.base, x, places, self["supertuning_values"])
        if y is None:
            return None
        return self._with_product(x, y)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self._with_product(x, y + sites.apply_weight(self.base, x, self._sparse()))

    def _with_product(self, x: Tensor, y: Tensor) -> Tensor:
        if self.config.r is None:
            return y
        a, b = (self[f"supertuning_lora_{m}"].to(y.dtype) for m in "AB")
        seen = F.dropout(x, self.config.lora_dropout, self.layer.training)
        return y + F.linear(F.linear(seen, a), b) * self.scale

    def _sparse(self) -> Tensor:
        values = self["supertuning_values"].float()
        zeros = values.new_zeros(self.site.outputs * self.site.inputs)
        made = zeros.scatter_add(0, self["supertuning_indices"].long(), values)
        return made.view(self.site.outputs, self.site.inputs)

    def delta(self) -> Tensor:
        if self.config.r is None:
            return self._sparse()
        a, b = (self[f"supertuning_lora_{m}"].float() for m in "AB")
        return self._sparse() + b @ a * self.scale


CONFIG = SupertuningConfig
GRAFT = Supertuning
