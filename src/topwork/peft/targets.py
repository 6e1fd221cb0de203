"""Which modules of a model an adapter goes to."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from topwork.errors import ConfigError, nearest
from topwork.peft.config import LoraConfig
from topwork.peft.layer import LoraLayer, SavedModule, kind_of

# The usual targets of a family, where the configuration names none.
USUAL = {
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
}


def target_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that `config` targets. ConfigError when it, or an entry, finds none."""
    leaves = {name: module for name, module in leaves_of(model) if not _saved(name, config)}
    wanted = config.target_modules
    if wanted is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in USUAL:
            raise ConfigError(
                f"target_modules is not given, and model_type {kind!r} has no usual ones; "
                "name them, or say 'all-linear'"
            )
        wanted = USUAL[kind]
    if wanted == "all-linear":
        head = _output_head(model)
        found = [n for n, m in leaves.items() if kind_of(m) != "embedding" and m is not head]
    elif isinstance(wanted, str):
        found = [n for n in leaves if re.fullmatch(wanted, n)]
        _need(found, wanted, leaves, model)
    else:
        for entry in wanted:
            _need([n for n in leaves if _ends(n, entry)], entry, leaves, model)
        found = [n for n in leaves if any(_ends(n, entry) for entry in wanted)]
    chosen = [n for n in found if not _excluded(n, config) and _in_layers(n, config)]
    if not chosen:
        raise ConfigError(
            f"target_modules={wanted!r} finds modules of {type(model).__name__}, but "
            "exclude_modules and layers_to_transform leave none of them"
        )
    return chosen


def leaves_of(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules that can carry an adapter; those that carry one already count once."""
    for name, module in model.named_modules():
        inside = ".base_layer" in name or ".lora_" in name
        if not inside and (isinstance(module, LoraLayer) or kind_of(module) is not None):
            yield name, module.base_layer if isinstance(module, LoraLayer) else module


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, SavedModule):
        head = head.original_module
    return head.base_layer if isinstance(head, LoraLayer) else head  # type: ignore[return-value]


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _need(found: list[str], entry: str, leaves: Iterable[str], model: nn.Module) -> None:
    if not found:
        names = {n.rpartition(".")[2] for n in leaves}
        raise ConfigError(
            f"target_modules={entry!r} matches no module of {type(model).__name__}"
            f"{nearest(entry, names)}; there are {', '.join(sorted(names))}"
        )


def _saved(name: str, config: LoraConfig) -> bool:
    parts = name.split(".")
    return any(entry in parts for entry in config.modules_to_save or [])


def _excluded(name: str, config: LoraConfig) -> bool:
    out = config.exclude_modules
    if isinstance(out, str):
        return re.fullmatch(out, name) is not None
    return any(_ends(name, entry) for entry in out or [])


def _in_layers(name: str, config: LoraConfig) -> bool:
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
