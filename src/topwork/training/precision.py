"""bf16 and fp32: what is cast before a run."""

from __future__ import annotations

import torch
from torch import nn

from topwork.peft.inject import layers_of
from topwork.peft.tensors import Tensors


@torch.no_grad()
def cast(model: nn.Module, bf16: bool) -> None:
    """Cast the model's floating tensors to bfloat16 (or fp32); adapters stay fp32 masters."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    own = {id(t) for layer in layers_of(model) for n in layer.grafts for _, t in layer.held(n)}
    own |= {id(t) for m in model.modules() if isinstance(m, Tensors) for t in m.parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in own:
            parameter.data = parameter.data.to(dtype)
