"""A module that is trained whole beside an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from topwork.errors import ConfigError
from topwork.peft.rows import Rows


class SavedModule(nn.Module):
    """A module that is trained whole, one copy per adapter (`modules_to_save`)."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.rows: Rows | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.chosen, name)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.active)

    @property
    def disable_adapters(self) -> bool:
        return self.disabled

    def enable_adapters(self, enabled: bool) -> None:
        """Compute with the adapters' copies or with the original."""
        self.disabled = not enabled

    @property
    def wrapped_module(self) -> nn.Module:
        return self.original_module

    @property
    def chosen(self) -> nn.Module:
        """The module that computes."""
        if self.rows is not None and not self.disabled:
            raise ConfigError(
                f"adapter_names: what is trained whole of {type(self.original_module).__name__} "
                "differs by row, and is asked for at once"
            )
        for name in self.active:
            if name in self.modules_to_save and not self.disabled:
                return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None or self.disabled:
            return self.chosen(*args, **kwargs)
        return self.rows.apply(args[0], self._of)

    def _of(self, name: str) -> nn.Module:
        """The copy of adapter `name`, or the original."""
        held = name in self.modules_to_save
        return self.modules_to_save[name] if held else self.original_module
