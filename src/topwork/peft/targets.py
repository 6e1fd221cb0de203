"""Which modules of a model an adapter goes to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from topwork.errors import ConfigError, TopworkWarning, nearest
from topwork.peft import sites
from topwork.peft.config import TASK_HEADS, LayerConfig, TaskType


def target_names(
    model: nn.Module,
    config: LayerConfig,
    kinds: tuple[sites.Kind, ...] = ("linear", "conv", "embedding"),
) -> list[str]:
    """Paths of the modules of these `kinds` that `config` targets, in the model's order.

    ConfigError when the whole, or one of its entries, finds no module.
    """
    every = {n: m for n, m in walk(model) if sites.site_of(base_of(m)).kind in kinds}
    leaves = {n: m for n, m in every.items() if not _saved(n, config)}
    wanted = config.target_modules or []
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        head = _output_head(model)
        found = [
            n
            for n, m in leaves.items()
            if sites.site_of(base_of(m)).kind in ("linear", "multihead") and base_of(m) is not head
        ]
    elif isinstance(wanted, str):
        found = [n for n in leaves if re.fullmatch(wanted, n)]
        _need(found, wanted, leaves, model)
    else:
        for entry in wanted:
            _need([n for n in every if ends(n, entry)], entry, leaves, model)
        found = [n for n in leaves if any(ends(n, entry) for entry in wanted)]
    kept = [n for n in found if not _excluded(n, config)]
    if config.exclude_modules and len(kept) == len(found):
        warnings.warn(
            f"exclude_modules={config.exclude_modules!r} excludes none of the targets",
            TopworkWarning,
            stacklevel=5,
        )
    chosen = [n for n in kept if _in_layers(n, config)]
    if not chosen:
        raise ConfigError(
            f"target_modules={wanted!r} finds modules of {type(model).__name__}, but "
            "modules_to_save, exclude_modules and layers_to_transform leave none of them"
        )
    return chosen


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules below `model` as they were before any adapter: nothing inside one counts, and
    nothing inside torch's MultiheadAttention, which takes its weights without calling them."""
    for name, child in model.named_children():
        here = f"{path}.{name}" if path else name
        yield here, child
        if not is_wrapper(child) and not isinstance(child, nn.MultiheadAttention):
            yield from walk(child, here)


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` stands around another to adapt it."""
    return hasattr(module, "wrapped_module")


def base_of(module: Any) -> nn.Module:
    """`module` without the adapters around it."""
    while is_wrapper(module):
        module = module.wrapped_module
    return module


def sharing(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """The other modules whose weight is that of one at `paths`: path → that one's."""
    owners = {id(base_of(model.get_submodule(p)).weight): p for p in paths}
    return {
        path: owners[id(base_of(module).weight)]
        for path, module in walk(model)
        if path not in owners.values() and id(getattr(base_of(module), "weight", None)) in owners
    }


def usual_of(model: nn.Module, usual: dict[str, Any]) -> Any:
    """The entry of `usual` (model_type → targets) for `model`; ConfigError without one."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in usual:
        raise ConfigError(
            f"target_modules is not given, and model_type {kind!r} has no usual ones; "
            "name them, or say 'all-linear'"
        )
    return usual[kind]


def by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that ends `path` (or, with ^, starts it), else `default`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def ends(path: str, entry: str) -> bool:
    """Whether the last parts of `path` are `entry`."""
    return path == entry or path.endswith("." + entry)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return None if head is None else base_of(head)


def _need(found: list[str], entry: str, leaves: Iterable[str], model: nn.Module) -> None:
    if not found:
        names = {n.rpartition(".")[2] for n in leaves}
        raise ConfigError(
            f"target_modules={entry!r} matches no module of {type(model).__name__}"
            f"{nearest(entry, names)}; there are {', '.join(sorted(names))}"
        )


def _saved(name: str, config: LayerConfig) -> bool:
    """Whether the module is trained whole beside the adapter, and so is no layer for it."""
    heads = TASK_HEADS.get(TaskType(config.task_type), ()) if config.task_type else ()
    parts = f".{name}."
    return any(f".{entry}." in parts for entry in (*(config.modules_to_save or []), *heads))


def _excluded(name: str, config: LayerConfig) -> bool:
    out = config.exclude_modules
    if isinstance(out, str):
        return re.fullmatch(out, name) is not None
    return any(ends(name, entry) for entry in out or [])


def _in_layers(name: str, config: LayerConfig) -> bool:
    layers = config.layers_to_transform
    if layers is None:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.layers_pattern or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        match = re.search(rf"(?:^|\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1)) in layers
    return False
