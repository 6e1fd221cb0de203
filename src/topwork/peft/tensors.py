"""What holds the tensors of adapters, under the names that files have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.config import PeftConfig


class Matrix(nn.Module):
    """A leaf that holds a `weight` (and a `bias`) under the names that files have."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


class Bare(Matrix):
    """A leaf whose `weight` stands in files under the leaf's own name."""


class Tensors(nn.Module):
    """A dictionary of tensors: parameters stay parameters, others are buffers."""

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self._parameters and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor)
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters or name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)

    def keys(self) -> list[str]:
        return [*self._parameters, *self._buffers]

    def values(self) -> list[Tensor]:
        return [self[name] for name in self.keys()]

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, self[name]) for name in self.keys()]


def hold(home: Any, name: str, made: Tensor | nn.Module) -> nn.Module:
    """`home` with `made` under `name`: where methods that call theirs alike keep a module and a
    tensor, as modules both."""
    if isinstance(made, Tensor) and isinstance(home, nn.ModuleDict):
        made = Bare(made)
    if isinstance(made, nn.Module) and isinstance(home, Tensors):
        home = nn.ModuleDict({key: Bare(tensor) for key, tensor in home.items()})
    home[name] = made  # type: ignore[assignment, index]
    return home


class Shared:
    """What a method keeps once for all layers of an adapter, in `Tensors` of the whole model."""

    def __init__(self, home: nn.Module, name: str, layers: list[tuple[str, sites.Site]]) -> None:
        self.home = home
        self.name = name
        self.layers = layers
        """The layers that the adapter goes to, in the model's order."""
        self.made: dict[tuple[str, str], nn.Module] = {}  # what a layer made for others too

    def __getitem__(self, key: str) -> Tensor:
        """To compute with: fp32, where it is kept in half precision."""
        found: Tensor = getattr(self.home, key)[self.name]
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def check_name(name: str, taken: dict[str, PeftConfig]) -> None:
    """Refuse an adapter's name that is taken or cannot be a module's."""
    if name in taken:
        raise ConfigError(f"there is an adapter {name!r} already")
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or name == "__base__":
        raise ConfigError(f"an adapter cannot be named {name!r}; it needs a name without dots")
