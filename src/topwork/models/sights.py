"""How images become a decoder's features: a vision tower, and a projector behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.models.config import Config
from topwork.models.vision import VisionSpec, VisionTower
from topwork.nn.layers import ACTIVATIONS, activation, linears
from topwork.nn.norms import NormSpec
from topwork.nn.paths import part, place, place_parameter


class Projector(Protocol):
    """From the tower's states to the decoder's size."""

    def place(self, home: nn.Module) -> None:
        """Put its parameters into the model."""

    def projected(self, home: nn.Module, x: Tensor) -> Tensor:
        """x [B, T, C] → [B, image tokens, hidden]."""
        ...


@dataclass(frozen=True)
class MlpProjector:
    """linear₂(act(linear₁(x))) (LLaVA)."""

    width: int
    hidden: int
    activation: str
    bias: bool = True
    path: str = "multi_modal_projector"

    def place(self, home: nn.Module) -> None:
        activation(self.activation, "projector_hidden_act")
        place(home, f"{self.path}.linear_1", nn.Linear(self.width, self.hidden, bias=self.bias))
        place(home, f"{self.path}.linear_2", nn.Linear(self.hidden, self.hidden, bias=self.bias))

    def projected(self, home: nn.Module, x: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation](linears(x, (part(home, f"{self.path}.linear_1"),))[0])
        return linears(inner, (part(home, f"{self.path}.linear_2"),))[0]


@dataclass(frozen=True)
class LinearProjector:
    """W x (+ b); with `shuffle` f on each square of f x f neighbouring patches (Idefics 3)."""

    width: int
    hidden: int
    path: str
    bias: bool = True
    shuffle: int = 1

    def place(self, home: nn.Module) -> None:
        width = self.width * self.shuffle**2
        place(home, self.path, nn.Linear(width, self.hidden, bias=self.bias))

    def projected(self, home: nn.Module, x: Tensor) -> Tensor:
        if self.shuffle > 1:
            x = squares(x, self.shuffle).flatten(2)
        return linears(x, (part(home, self.path),))[0]


@dataclass(frozen=True)
class PooledProjector:
    """norm(mean of each square of patches) W (Gemma 3). `side`: squares along an image's side."""

    width: int
    hidden: int
    side: int
    norm: NormSpec
    path: str = "multi_modal_projector"

    def place(self, home: nn.Module) -> None:
        weight = torch.zeros(self.width, self.hidden)
        place_parameter(home, f"{self.path}.mm_input_projection_weight", weight)
        place(home, f"{self.path}.mm_soft_emb_norm", self.norm.build(self.width))

    def projected(self, home: nn.Module, x: Tensor) -> Tensor:
        count = round(x.shape[1] ** 0.5)
        pooled = squares(x, count // self.side).mean(2)
        mine = part(home, self.path)
        return (mine.mm_soft_emb_norm(pooled) @ mine.mm_input_projection_weight).to(x.dtype)


def squares(x: Tensor, side: int) -> Tensor:
    """The tokens of a square image [B, n², C] by squares: [B, (n/side)², side², C]."""
    count = round(x.shape[1] ** 0.5)
    if count**2 != x.shape[1] or count % side:
        raise ConfigError(f"{x.shape[1]} patches do not make squares of {side} x {side}")
    grid = x.unflatten(1, (count // side, side, count // side, side))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@dataclass(frozen=True)
class TowerSight:
    """States of one tower, projected. `layers`: those whose states are read, one beside the other
    (counted as in `hidden_states`); None: the last one's, after the final norm. `skip`: so many
    first tokens are left out."""

    tower: VisionSpec
    config: Config
    projector: Projector
    path: str = "vision_tower.vision_model"
    layers: tuple[int, ...] | None = None
    skip: int = 0

    inputs = ("pixel_values",)

    def place(self, home: nn.Module) -> None:
        place(home, self.path, VisionTower(self.config, self.tower))
        self.projector.place(home)

    def checkpoint(self, home: nn.Module, on: bool) -> None:
        part(home, self.path).checkpointing = on

    def features(self, home: nn.Module, pixel_values: Tensor) -> Tensor:
        tower = part(home, self.path)
        if pixel_values.dim() == 5:  # [B, images, channels, height, width]
            pixel_values = pixel_values.flatten(0, 1)
        if self.layers is None:
            x = tower.normed(tower.features(pixel_values, -1))
        else:
            x = self._read(tower, pixel_values)
        return self.projector.projected(home, x[:, self.skip :]).flatten(0, 1)

    def _read(self, tower: VisionTower, pixel_values: Tensor) -> Tensor:
        assert self.layers is not None
        count = self.tower.count + 1
        wanted = [layer % count for layer in self.layers]
        held: dict[int, Tensor] = {}
        for i, state in enumerate(tower.states(tower.embed(pixel_values))):
            if i in wanted:
                held[i] = state
            if i == max(wanted):
                break
        return torch.cat([held[i] for i in wanted], -1)


@dataclass(frozen=True)
class TileSight:
    """Tiles of images, each looked at alone (Idefics 3).

    `pixel_values` [B, tiles, channels, height, width], rows with fewer tiles filled up with zeros;
    `pixel_attention_mask` [B, tiles, height, width] is 0 where a tile itself is padded.
    """

    tower: VisionSpec
    config: Config
    projector: Projector
    path: str = "model.vision_model"

    inputs = ("pixel_values", "pixel_attention_mask")

    def place(self, home: nn.Module) -> None:
        place(home, self.path, VisionTower(self.config, self.tower))
        self.projector.place(home)

    def checkpoint(self, home: nn.Module, on: bool) -> None:
        part(home, self.path).checkpointing = on

    def features(
        self, home: nn.Module, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None
    ) -> Tensor:
        tiles = pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        real = tiles.flatten(1).any(1)
        tiles = tiles[real]
        if pixel_attention_mask is None:
            mask = tiles.new_ones(len(tiles), *tiles.shape[2:])
        else:
            mask = pixel_attention_mask.flatten(0, 1)[real]
        patch = self.tower.patches.patch
        seen = F.max_pool2d(mask[:, None].float(), patch, patch)[:, 0] > 0  # [N, down, across]
        places, keep = self._places(seen), seen.flatten(1)
        tower = part(home, self.path)
        x = tower(tiles, patch_positions=places, patch_mask=keep).last_hidden_state
        return self.projector.projected(home, x).flatten(0, 1)

    def _places(self, seen: Tensor) -> Tensor:
        """Each patch's place among the learned ones, by its share of the tile's height and width
        (arXiv:2307.06304); 0 for padding."""
        own = self.tower.patches.grid[0]
        edges = torch.arange(1 / own, 1.0, 1 / own, device=seen.device)

        def shares(count: Tensor, length: int) -> Tensor:
            steps = torch.arange(length, dtype=torch.float32, device=seen.device)
            return (steps * (1.0 / count)[:, None]).clamp(max=1.0 - 1e-6)

        down = torch.bucketize(shares(seen[:, :, 0].sum(1), seen.shape[1]), edges, right=True)
        across = torch.bucketize(shares(seen[:, 0].sum(1), seen.shape[2]), edges, right=True)
        found = down[:, :, None] * own + across[:, None, :]
        return (found * seen).flatten(1)
