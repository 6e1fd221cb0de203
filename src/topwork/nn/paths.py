"""Modules under the dotted names of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` below `root`; what lies between is made where it is missing.

    A name of digits is an entry of a ModuleList, and comes in order.
    """
    *between, leaf = path.split(".")
    home = root
    for name, following in zip(between, [*between[1:], leaf]):
        if not hasattr(home, name):
            home.add_module(name, nn.ModuleList() if following.isdigit() else nn.Module())
        home = getattr(home, name)
    home.add_module(leaf, module)


def place_parameter(root: nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a parameter of `value` at `path` below `root`."""
    *between, leaf = path.split(".")
    home = root
    for name in between:
        if not hasattr(home, name):
            home.add_module(name, nn.Module())
        home = getattr(home, name)
    home.register_parameter(leaf, nn.Parameter(value))


def part(root: nn.Module, path: str) -> Any:
    """The module at `path`, looked up when it is called: an adapter may have taken its place."""
    found: Any = root
    for name in path.split("."):
        found = getattr(found, name)
    return found
