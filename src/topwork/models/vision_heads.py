"""What stands on a vision tower: nothing but its name, or a classifier of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.models.base import Model
from topwork.models.config import Config
from topwork.models.heads import ClassifierOutput, classification_loss, label_count
from topwork.models.vision import VisionSpec, VisionTower
from topwork.nn.paths import part, place
from topwork.weights import Table


class TowerModel(Model):
    """A tower under its name on the Hub (`home`), with nothing beside it."""

    task = "base"

    def __init__(self, config: Config, tower: Model, home: str, table: Table) -> None:
        super().__init__(config)
        self.home, self.table = home, table
        place(self, home, tower)

    @property
    def trunk(self) -> Any:
        return part(self, self.home)

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.get_input_embeddings()

    def features(self, pixel_values: Tensor, layer: int, **options: Any) -> Tensor:
        """See `VisionTower.features`."""
        return self.trunk.features(pixel_values, layer, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's own call."""
        return self.trunk(*args, **kwargs)


def first_token(x: Tensor) -> Tensor:
    """What a classifier reads of the tokens [B, T, C]: the first one."""
    return x[:, 0]


def mean_of_patches(lead: int) -> Callable[[Tensor], Tensor]:
    """The mean of the patches' tokens, `lead` tokens standing before them."""
    return lambda x: x[:, lead:].mean(1)


def first_and_mean(lead: int) -> Callable[[Tensor], Tensor]:
    """The first token and the mean of the patches', one behind the other."""
    return lambda x: torch.cat((x[:, 0], x[:, lead:].mean(1)), -1)


@dataclass(frozen=True)
class ClassSpec:
    """A classifier's place, and what it reads of the tokens: a vector of `width`."""

    home: str
    gather: Callable[[Tensor], Tensor]
    width: int
    out: str = "classifier"


class ImageClassifier(Model):
    """A tower and a linear head."""

    task = "image-classification"

    def __init__(self, config: Config, spec: VisionSpec, classes: ClassSpec, table: Table) -> None:
        super().__init__(config)
        self.classes, self.table = classes, table
        place(self, classes.home, VisionTower(config, spec))
        place(self, classes.out, nn.Linear(classes.width, label_count(config)))

    @property
    def trunk(self) -> VisionTower:
        return part(self, self.classes.home)

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ClassifierOutput:
        """`labels`: [B] of classes, or of values (regression), or [B, labels] of yes and no."""
        tower = self.trunk
        hidden = tower.normed(
            tower.features(pixel_values, -1, interpolate=interpolate_pos_encoding)
        )
        logits = part(self, self.classes.out)(self.classes.gather(hidden))
        problem = self.config.get("problem_type")
        loss = None if labels is None else classification_loss(logits, labels, problem)
        return ClassifierOutput(loss, logits)
