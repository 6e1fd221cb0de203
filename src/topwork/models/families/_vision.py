"""What the vision families read alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from topwork.models.config import Config, ConfigReader
from topwork.models.vision import VisionSpec, VisionTower
from topwork.models.vision_heads import ClassSpec, ImageClassifier
from topwork.weights import Rename, Table

OLD_HEADS = ("query", "key", "value")


def pair(value: Any) -> tuple[int, int]:
    """One number for both sides, or [height, width]."""
    if isinstance(value, (list, tuple)):
        return tuple(int(v) for v in value)  # type: ignore[return-value]
    return int(value), int(value)


def renamed_heads(layer: str) -> tuple[Rename, ...]:
    """The names that newer software gives to the parts of attention, in layers at `layer`."""
    to = "encoder.layer.*.attention"
    pairs = [(f"{name[0]}_proj", f"attention.{name}") for name in OLD_HEADS]
    return tuple(
        Rename(f"{layer}.*.attention.{new}", f"{to}.{old}")
        for new, old in (*pairs, ("o_proj", "output.dense"))
    )


def tower_models(
    prefix: str,
    spec: Callable[[ConfigReader], VisionSpec],
    classes: Callable[[VisionSpec], ClassSpec],
    table: Table,
    optional: tuple[str, ...] = (),
    unpooled: Callable[[VisionSpec], VisionSpec] = lambda spec: spec,
) -> dict[str, Any]:
    """The models of a family of one tower: bare, and a classifier of images.

    `optional`: paths of the tower's that a file may lack or have too many; `unpooled` is the tower
    below a classifier.
    """
    names = (*optional, "classifier")
    drop = tuple(rf"^({prefix}\.)?{re.escape(name)}(\.|$)" for name in names)

    def bare(config: Config, read: ConfigReader) -> VisionTower:
        tower = VisionTower(config, spec(read))
        fresh = tuple(rf"^{re.escape(name)}(\.|$)" for name in optional)
        tower.table = Table(old=table.old, drop=drop, prefix=prefix + ".", fresh=fresh)
        return tower

    def classifier(config: Config, read: ConfigReader) -> ImageClassifier:
        found = unpooled(spec(read))
        names = Table(old=table.old, drop=drop, prefix=prefix + ".", fresh=(r"^classifier\.",))
        return ImageClassifier(config, found, classes(found), names)

    return {"base": bare, "image-classification": classifier}
