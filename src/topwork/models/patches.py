"""The vision tower of Qwen2-VL and Qwen2.5-VL: patches of images of any size, packed in one row.

x = patches W;   for each block:   x = x + attention(norm(x));   x = x + mlp(norm(x))
features = mlp(squares of merge x merge neighbouring patches of norm(x))

Patches turn by their row and column (arXiv:2409.12191). In Qwen2.5-VL most blocks look no further
than a window of the image (arXiv:2502.13923).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.nn.layers import Mlp, MlpSpec, PlainMlp, PlainMlpSpec, linears
from topwork.nn.norms import NormSpec
from topwork.nn.paths import part, place
from topwork.ops.recompute import recomputed


@dataclass(frozen=True)
class GridTowerSpec:
    """`patch`: pixels along a patch's side, `frames` of them deep; `merge`: patches along the side
    of what becomes one token of size `out`. `window`: how many tokens wide and high blocks look,
    but for those in `full`."""

    channels: int
    hidden: int
    heads: int
    count: int
    patch: int
    frames: int
    merge: int
    out: int
    norm: NormSpec
    mlp: MlpSpec | PlainMlpSpec
    theta: float = 10000.0
    window: int | None = None
    full: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 4:
            raise ConfigError(
                f"{self.hidden} / {self.heads} heads of the vision tower: the size of a head must "
                "be a multiple of 4"
            )

    @property
    def pixels(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.frames * self.patch**2


@dataclass(frozen=True)
class Rows:
    """Where the patches lie: the lengths of what sees each other, and their angles."""

    frames: ops.Layout
    windows: ops.Layout
    cos: Tensor
    sin: Tensor


class GridBlock(nn.Module):
    """x = x + attention(norm(x));   x = x + mlp(norm(x))."""

    def __init__(self, spec: GridTowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm1, self.norm2 = (spec.norm.build(spec.hidden) for _ in range(2))
        place(self, "attn.qkv", nn.Linear(spec.hidden, 3 * spec.hidden))
        place(self, "attn.proj", nn.Linear(spec.hidden, spec.hidden))
        self.mlp: Mlp | PlainMlp = spec.mlp.build(spec.hidden)

    def forward(self, x: Tensor, layout: ops.Layout, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, N, C] → [1, N, C]."""
        size = self.spec.hidden // self.spec.heads
        qkv = linears(self.norm1(x), (part(self, "attn.qkv"),))[0]
        q, k, v = qkv.unflatten(-1, (3, self.spec.heads, size)).unbind(2)
        q, k = (ops.rotary(y, cos, sin) for y in (q, k))
        y = ops.attention(q, k, v, layout, ops.Rule(size**-0.5, causal=False))
        x = x + linears(y.flatten(2), (part(self, "attn.proj"),))[0]
        return x + self.mlp(self.norm2(x))


class GridTower(nn.Module):
    """Patches of all images to the decoder's features."""

    def __init__(self, spec: GridTowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpointing = False
        cube = (spec.frames, spec.patch, spec.patch)
        make = nn.Conv3d(spec.channels, spec.hidden, cube, cube, bias=False)
        place(self, "patch_embed.proj", make)
        self.blocks = nn.ModuleList(GridBlock(spec) for _ in range(spec.count))
        wide = spec.hidden * spec.merge**2
        place(self, "merger.ln_q", spec.norm.build(spec.hidden))
        place(self, "merger.mlp.0", nn.Linear(wide, wide))
        place(self, "merger.mlp.2", nn.Linear(wide, spec.out))

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Patches [N, pixels] of images whose `grids` [images, 3] count frames, rows and columns;
        those of a merged square follow each other. Features [N / merge², out]."""
        spec, merged = self.spec, self.spec.merge**2
        self._check(patches, grids)
        make = part(self, "patch_embed.proj")
        x = F.linear(patches.to(make.weight.dtype), make.weight.flatten(1))
        order, sizes = self.order(grids)
        x = x.view(-1, merged, spec.hidden)[order].view(1, -1, spec.hidden)
        rows = self._rows(grids, order, sizes, x)
        for i, block in enumerate(self.blocks):
            near = spec.window is not None and i not in spec.full
            layout = rows.windows if near else rows.frames
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = recomputed(block, x, layout, rows.cos, rows.sin)
            else:
                x = block(x, layout, rows.cos, rows.sin)
        x = part(self, "merger.ln_q")(x).view(-1, merged * spec.hidden)
        inner = F.gelu(linears(x, (part(self, "merger.mlp.0"),))[0])
        features = linears(inner, (part(self, "merger.mlp.2"),))[0]
        return features[order.argsort()]

    def _check(self, patches: Tensor, grids: Tensor) -> None:
        spec = self.spec
        if patches.dim() != 2 or patches.shape[1] != spec.pixels:
            raise ConfigError(
                f"pixel_values {list(patches.shape)} must be [patches, {spec.pixels}] "
                f"({spec.channels} channels x {spec.frames} frames x {spec.patch}² pixels)"
            )
        count = int(grids.prod(-1).sum())
        if count != len(patches):
            raise ConfigError(
                f"image_grid_thw {grids.tolist()} describes {count} patches, but pixel_values has "
                f"{len(patches)}"
            )
        if bool((grids[:, 1:] % spec.merge).any()):
            raise ConfigError(
                f"image_grid_thw {grids.tolist()}: rows and columns must be multiples of "
                f"spatial_merge_size={spec.merge}"
            )

    def order(self, grids: Tensor) -> tuple[Tensor, list[int]]:
        """The merged squares window by window [M], and how many patches each window has."""
        spec, merged = self.spec, self.spec.merge**2
        order, sizes, begin = [], [], 0
        for frames, high, wide in grids.tolist():
            high, wide = high // spec.merge, wide // spec.merge
            index = torch.arange(begin, begin + frames * high * wide).view(frames, high, wide)
            begin += index.numel()
            side = spec.window or max(high, wide)
            for frame in index:
                for strip in frame.split(side, 0):
                    for window in strip.split(side, 1):
                        order.append(window.flatten())
                        sizes.append(window.numel() * merged)
        return torch.cat(order).to(grids.device), sizes

    def _rows(self, grids: Tensor, order: Tensor, sizes: list[int], like: Tensor) -> Rows:
        spec = self.spec
        places = []
        for frames, high, wide in grids.tolist():
            grid = torch.stack(
                torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"), -1
            )
            side = spec.merge
            square = grid.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)
            places.append(square.reshape(-1, 2).repeat(frames, 1))
        place_of = torch.cat(places).to(like.device).view(-1, spec.merge**2, 2)[order].view(-1, 2)
        half = spec.hidden // spec.heads // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32, device=like.device) / half
        angles = (place_of[..., None].float() / spec.theta**steps).flatten(1)[None]  # [1, N, D/2]
        frames = [n for t, h, w in grids.tolist() for n in [h * w] * t]
        return Rows(ops.Layout(tuple(frames)), ops.Layout(tuple(sizes)), angles.cos(), angles.sin())


@dataclass(frozen=True)
class GridSight:
    """A `GridTower` at `path`."""

    tower: GridTowerSpec
    path: str = "visual"

    inputs = ("pixel_values", "image_grid_thw")

    def place(self, home: nn.Module) -> None:
        place(home, self.path, GridTower(self.tower))

    def checkpoint(self, home: nn.Module, on: bool) -> None:
        part(home, self.path).checkpointing = on

    def features(self, home: nn.Module, pixel_values: Tensor, image_grid_thw: Any = None) -> Tensor:
        if image_grid_thw is None:
            raise ConfigError(
                "pixel_values need image_grid_thw, the rows and columns of each image"
            )
        return part(home, self.path)(pixel_values, image_grid_thw)
