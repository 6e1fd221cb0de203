"""What adapters are where, and in what state."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from topwork.errors import ConfigError
from topwork.peft.layer import AdaptedLayer
from topwork.peft.saved import SavedModule
from topwork.quant import Summary

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class LayerStatus:
    """One layer; "irregular" stands where its adapters' parameters differ."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class ModelStatus:
    """All layers together; "irregular" stands where they differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def counted(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    packed = Summary.of(model).numbers
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes) + packed


def share(model: nn.Module) -> str:
    """What `print_trainable_parameters` prints."""
    trainable, total = counted(model)
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The status of each layer with adapters. ConfigError when there is none."""
    inner: Any = getattr(model, "base_model", model) if hasattr(model, "peft_config") else model
    found = []
    for name, module in inner.named_modules():
        if isinstance(module, AdaptedLayer):
            tensors = {n: [t for _, t in module.held(n)] for n in module.grafts}
        elif isinstance(module, SavedModule):
            tensors = {n: list(m.parameters()) for n, m in module.modules_to_save.items()}
        else:
            continue
        found.append(_layer(name, module, tensors))
    if not found:
        raise ConfigError(f"{type(model).__name__} has no layer with an adapter")
    return found


def _layer(name: str, module: Any, tensors: dict[str, list[Any]]) -> LayerStatus:
    floating = {n: [t for t in ts if t.is_floating_point()] for n, ts in tensors.items()}
    return LayerStatus(
        name=name,
        module_type=type(module.wrapped_module).__name__,
        enabled=not module.disabled,
        active_adapters=list(module.active),
        merged_adapters=list(getattr(module, "merged_adapters", [])),
        requires_grad={n: _same(t.requires_grad for t in ts) for n, ts in floating.items()},
        available_adapters=sorted(tensors),
        devices={n: sorted({t.device.type for t in ts}) for n, ts in tensors.items()},
    )


def _same(values: Iterable[T]) -> T | str:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


def get_model_status(model: Any) -> ModelStatus:
    """The status of all layers with adapters. ConfigError when there is none."""
    layers = get_layer_status(model)
    configs = getattr(model, "peft_config", {})
    wrapped = hasattr(model, "get_base_model")
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    names = sorted({name for layer in layers for name in layer.available_adapters})
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & set(s.available_adapters) - set(s.merged_adapters) for s in layers)
    active = _same(tuple(s.active_adapters) for s in layers)
    return ModelStatus(
        base_model_type=type(model.get_base_model() if wrapped else model).__name__,
        adapter_model_type=type(model).__name__ if wrapped else "None",
        peft_types={name: str(config.peft_type) for name, config in configs.items()},
        trainable_params=sum(n for n, trained in sizes if trained),
        total_params=sum(n for n, _ in sizes),
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=active if isinstance(active, str) else list(active),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={
            n: _same(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names
        },
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, [])}) for n in names},
    )
