"""Bottleneck adapters (Houlsby, arXiv:1902.00751; Pfeiffer, arXiv:2005.00247; parallel,
arXiv:2110.04366): a small MLP with a residual after a layer, or beside it. peft has none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.tensors import Matrix

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
# The output projections of attention and MLP, by model_type.
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo")
BOTH = {
    **{name: ["o_proj", "down_proj"] for name in GATED},
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["out_proj", "fc2"],
    "gpt_neox": ["attention.dense", "dense_4h_to_h"],
    "bloom": ["self_attention.dense", "dense_4h_to_h"],
    "bert": ["output.dense"],
    "roberta": ["output.dense"],
    "t5": ["SelfAttention.o", "EncDecAttention.o", "wo"],
}


@dataclass(kw_only=True)
class BottleneckConfig(LayerConfig):
    """y + s · U act(D y + b) + c after each targeted layer; beside it (`parallel`) with its input
    in place of y. Targets are the output projections of attention and MLP (Houlsby); name the
    MLP's alone for Pfeiffer's."""

    reduction_factor: float = 16
    """The layer's width over the bottleneck's."""
    non_linearity: str = "relu"
    is_parallel: bool = False
    scaling: float = 1.0
    dropout: float = 0.0
    """On what is added."""
    init_weights: bool = True
    """The added part starts at zero; False: at random."""
    peft_type: str = "BOTTLENECK"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("reduction_factor", self.reduction_factor, 1e-3)
        a_share("dropout", self.dropout)
        one_of("non_linearity", self.non_linearity, tuple(ACTIVATIONS))


class Bottleneck(Graft):
    USUAL: ClassVar = BOTH
    config: BottleneckConfig

    def widths(self) -> tuple[int, int, int]:
        """(in, bottleneck, out)."""
        site, config = self.site, self.config
        inputs = site.inputs if config.is_parallel else site.outputs
        return inputs, max(1, round(site.outputs / config.reduction_factor)), site.outputs

    def create(self) -> dict[str, Tensor | nn.Module]:
        inputs, width, outputs = self.widths()
        down, up = self.empty(width, inputs), self.empty(outputs, width)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.kaiming_uniform_(up, a=math.sqrt(5))
        if self.config.init_weights:
            up.zero_()
        return {
            "bottleneck_down": Matrix(down, self.empty(width).zero_()),
            "bottleneck_up": Matrix(up, self.empty(outputs).zero_()),
        }

    def linear(self, side: str) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias of the side "down" or "up"."""
        held = getattr(self.layer, f"bottleneck_{side}")[self.name]
        return held.weight, held.bias

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        config = self.config
        seen = x if config.is_parallel else y
        down, up = ([m.to(seen.dtype) for m in self.linear(side)] for side in ("down", "up"))
        inner = ACTIVATIONS[config.non_linearity](F.linear(seen, *down))
        added = F.linear(inner, *up)
        return y + F.dropout(added, config.dropout, self.layer.training) * config.scaling

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(
            f"a bottleneck adapter ({self.path}) is not linear: it cannot be merged into a weight"
        )


CONFIG = BottleneckConfig
GRAFT = Bottleneck
