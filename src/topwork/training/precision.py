"""bf16 and fp32: what is cast before a run."""

from __future__ import annotations

import re

import torch
from torch import nn

from topwork.peft import PeftModel

# The names under which methods keep their own parameters; they stay fp32 masters.
_ADAPTER = re.compile(r"\.(lora|ia3|hada|lokr|vera|oft|boft|hra|fourierft|prompt|prefix)_?\w*\.")


@torch.no_grad()
def cast(model: nn.Module, bf16: bool) -> None:
    """Cast the model's floating tensors to bfloat16 (or fp32); adapter matrices stay fp32."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    adapted = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        own = adapted and _ADAPTER.search(f".{name}") is not None
        if parameter.is_floating_point() and not own and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
