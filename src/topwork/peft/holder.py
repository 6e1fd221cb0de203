"""What stands between a `PeftModel` and the model that it adapts."""

from __future__ import annotations

from typing import Any

from torch import nn

from topwork.peft import convert, inject, scalings, state
from topwork.peft.layer import AdaptedLayer

VERBS = frozenset(
    {
        "active_adapters",
        "add_adapter",
        "add_weighted_adapter",
        "delete_adapter",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "merge_adapter",
        "merge_and_unload",
        "peft_config",
        "set_adapter",
        "set_requires_grad",
        "unload",
        "unmerge_adapter",
        "unload_shadow",
        "update_and_allocate",
    }
)
"""What scripts ask of `model.base_model`, which is peft's tuner there."""


OWN = frozenset({"supports_lora_conversion", "targeted_module_names"})


class Holder(nn.Module):
    """Stands where peft's tuner stands, so that names in memory equal those of its files."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def home_of(self, name: str) -> nn.Module:
        """Where an attribute is that the `PeftModel` does not have: here, in X-LoRA's classifier
        or in the model."""
        router = self._modules.get(state.ROUTER)
        if router is not None and name in scalings.ASKED:
            return router
        return self if name in self._modules or name in OWN else self.model

    @property
    def targeted_module_names(self) -> list[str]:
        """The layers with adapters, by their paths in the model."""
        return [path for path, m in inject.wrappers(self.model) if isinstance(m, AdaptedLayer)]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` has a LoRA adapter for this one."""
        return convert.converts(self.model, adapter_name)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter; a list of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_modules"):
                raise
            owner = self.__dict__.get("owner")
            verb = owner is not None and name in VERBS
            return getattr(owner if verb else self.home_of(name), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
