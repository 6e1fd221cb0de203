"""The resolved stack of a model, to read."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from itertools import groupby
from typing import Any

from topwork.models.base import Model
from topwork.quant import Summary


def describe(model: Model) -> str:
    """The resolved stack in a few lines: sizes, and each run of equal layers once.

    A part shows what differs from its usual values.
    """
    spec = model.trunk.spec
    tied = ", tied to the head" if model.tied else ""
    lines = [
        f"{model.config.model_type}: {model.num_parameters():,} parameters, {model.dtype}",
        f"embedding {spec.vocab} x {spec.hidden}{tied}",
    ]
    if model.quantization_config is not None:
        lines.append(f"quantised: {Summary.of(model)}")
    at = 0
    for layer, run in groupby(spec.layers):
        count = len(list(run))
        last = at + count - 1
        where = f"layer {at}" if count == 1 else f"layers {at}-{last}"
        lines.append(f"{where}: {'; '.join(_parts(layer))}")
        at += count
    shown = ("vocab", "hidden", "layers", "tied", "table", "names")
    return "\n".join([*lines, "; ".join(_parts(spec, leave=shown))])


def brief(value: Any) -> str:
    """A spec as `Name(field=value, …)`, fields at their defaults left out."""
    if not is_dataclass(value):
        return f"{value:g}" if isinstance(value, float) else repr(value)
    name = type(value).__name__.removesuffix("Spec")
    return f"{name}({', '.join(_parts(value))})"


def _parts(spec: Any, leave: tuple[str, ...] = ()) -> list[str]:
    shown = []
    for field in fields(spec):
        value = getattr(spec, field.name)
        default = field.default is not MISSING and value == field.default
        if not default and field.name not in leave:
            text = brief(value)
            named = is_dataclass(value) and text.lower().startswith(field.name[:3])
            shown.append(text if named else f"{field.name}={text}")
    return shown
