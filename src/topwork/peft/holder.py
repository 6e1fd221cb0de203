"""What stands between a `PeftModel` and the model that it adapts."""

from __future__ import annotations

from typing import Any

from torch import nn


class Holder(nn.Module):
    """Stands where peft's tuner stands, so that names in memory equal those of its files."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
