"""One vision transformer for the families of ViT, built from a spec.

x = norm(patches(image) + positions)      (behind a learned first token, where there is one)
for each block:   x = x + attention(norm(x));   x = x + feed(norm(x))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.base import Model
from topwork.models.config import Config
from topwork.models.output import Output
from topwork.models.prenorm import PreNormBlock, PreNormSpec, run_block
from topwork.nn.layers import ACTIVATIONS, activation, linears
from topwork.nn.paths import part, place, place_parameter
from topwork.ops.cross import cross_attention

# -- from an image to tokens -----------------------------------------------------------------------

REGISTERS = "embeddings.register_tokens"


@dataclass(frozen=True)
class PatchSpec:
    """An image's patches as tokens, and what stands before and on them.

    `image` and `patch`: height and width in pixels; the learned positions are those of an image of
    that size. `first`: the path of a token in front (None: none); `registers`: how many further
    tokens follow it, without a position. `positions`: their path, [1, N, C], or with `table` an
    embedding [N, C]. `any_size`: images of other sizes need not be asked for. `mask`: the path of
    the token that stands for a masked patch.
    """

    channels: int
    hidden: int
    image: tuple[int, int]
    patch: tuple[int, int]
    bias: bool = True
    projection: str = "embeddings.patch_embeddings.projection"
    first: str | None = "embeddings.cls_token"
    first_shape: tuple[int, ...] = (1, 1)
    positions: str = "embeddings.position_embeddings"
    table: bool = False
    registers: int = 0
    mask: str | None = None
    any_size: bool = False
    antialias: bool = False

    def __post_init__(self) -> None:
        for name in ("image", "patch"):
            size = getattr(self, name)
            if len(size) != 2 or min(size) < 1:
                raise ConfigError(f"{name}_size={size} must be one or two positive numbers")
        if min(self.grid) < 1:
            raise ConfigError(f"patch_size={self.patch} is larger than image_size={self.image}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def lead(self) -> int:
        """Tokens in front of the patches."""
        return (self.first is not None) + self.registers

    def place(self, home: nn.Module) -> None:
        """Put the parts into the tower."""
        make = nn.Conv2d(self.channels, self.hidden, self.patch, self.patch, bias=self.bias)
        place(home, self.projection, make)
        count = self.grid[0] * self.grid[1] + (self.first is not None)
        if self.first is not None:
            shape = (*self.first_shape, self.hidden)
            place_parameter(home, self.first, torch.randn(shape) * self.hidden**-0.5)
        if self.registers:
            place_parameter(home, REGISTERS, torch.zeros(1, self.registers, self.hidden))
        if self.mask is not None:
            place_parameter(home, self.mask, torch.zeros(1, self.hidden))
        if self.table:
            place(home, self.positions, nn.Embedding(count, self.hidden))
        else:
            place_parameter(home, self.positions, torch.zeros(1, count, self.hidden))

    def tokens(
        self,
        home: nn.Module,
        pixels: Tensor,
        interpolate: bool = False,
        masked: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Images [B, channels, height, width] → [B, T, C].

        `interpolate`: images of another size get positions drawn from between the learned ones.
        `masked` [B, N] is True where a patch is hidden. `places` [B, N]: which of the learned
        positions each patch has.
        """
        if pixels.dim() != 4 or pixels.shape[1] != self.channels:
            raise ConfigError(
                f"pixel_values {list(pixels.shape)} must be [batch, {self.channels}, height, width]"
            )
        size = (pixels.shape[2], pixels.shape[3])
        project = part(home, self.projection)
        if size != self.image and not (interpolate or self.any_size or places is not None):
            raise ConfigError(
                f"images of {size[0]} x {size[1]} pixels for a model of {self.image[0]} x "
                f"{self.image[1]}: resize them, or pass interpolate_pos_encoding=True"
            )
        if size[0] < self.patch[0] or size[1] < self.patch[1]:
            raise ConfigError(f"images of {size[0]} x {size[1]} pixels are smaller than a patch")
        x = project(pixels.to(project.weight.dtype)).flatten(2).transpose(1, 2)  # [B, N, C]
        if masked is not None:
            if self.mask is None:
                raise ConfigError("bool_masked_pos: this model has no token for masked patches")
            x = torch.where(masked.bool()[..., None], part(home, self.mask).to(x.dtype), x)
        table = part(home, self.positions)
        table = table.weight if self.table else table[0]  # [N, C]
        ahead = self.first is not None
        grid = (size[0] // self.patch[0], size[1] // self.patch[1])
        if places is not None:
            x = x + table[ahead:][places]
        elif grid == self.grid:
            x = x + table[ahead:]
        else:
            x = x + self._between(table[ahead:], grid)
        if not ahead:
            return x
        lead = part(home, str(self.first)).view(1, 1, -1) + table[:1]
        if self.registers:
            lead = torch.cat((lead, part(home, REGISTERS)), 1)
        return torch.cat((lead.to(x.dtype).expand(len(x), -1, -1), x), 1)

    def _between(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Positions [N, C] for another grid of patches, by bicubic interpolation."""
        spread = table.float().view(1, *self.grid, -1).permute(0, 3, 1, 2)
        made = F.interpolate(
            spread, grid, mode="bicubic", align_corners=False, antialias=self.antialias
        )
        return made[0].flatten(1).T.to(table.dtype)


# -- one vector for an image -----------------------------------------------------------------------


class Pooling(Protocol):
    """How the tokens of an image become one vector."""

    def place(self, home: nn.Module) -> None:
        """Put its parameters into the tower."""

    def pooled(self, home: nn.Module, x: Tensor) -> Tensor:
        """x [B, T, C] → [B, C]."""
        ...


@dataclass(frozen=True)
class FirstToken:
    """The first token as it is."""

    def place(self, home: nn.Module) -> None:
        """It has no parameters."""

    def pooled(self, home: nn.Module, x: Tensor) -> Tensor:
        return x[:, 0]


@dataclass(frozen=True)
class DensePooling:
    """act(dense(first token)) (ViT)."""

    hidden: int
    width: int
    activation: str
    path: str = "pooler.dense"

    def place(self, home: nn.Module) -> None:
        activation(self.activation, "pooler_act")
        place(home, self.path, nn.Linear(self.hidden, self.width))

    def pooled(self, home: nn.Module, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](part(home, self.path)(x[:, 0]))


@dataclass(frozen=True)
class NormedFirst:
    """norm(first token), a norm that the tokens themselves do not get (CLIP)."""

    hidden: int
    eps: float
    path: str = "post_layernorm"

    def place(self, home: nn.Module) -> None:
        place(home, self.path, nn.LayerNorm(self.hidden, self.eps))

    def pooled(self, home: nn.Module, x: Tensor) -> Tensor:
        return part(home, self.path)(x[:, 0])


class ProbeAttention(nn.Module):
    """Attention of one learned query; q, k and v lie in one weight [3C, C]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, probe: Tensor, x: Tensor) -> Tensor:
        """probe [1, 1, C], x [B, T, C] → [B, 1, C]."""
        hidden = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(probe, weight[:hidden], bias[:hidden]).expand(len(x), -1, -1)
        k, v = F.linear(x, weight[hidden:], bias[hidden:]).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        y = cross_attention(q, k, v, (hidden // self.heads) ** -0.5)
        return linears(y.flatten(2), (self.out_proj,))[0]


@dataclass(frozen=True)
class ProbePooling:
    """p = attention(probe, x);   p + mlp(norm(p)) (SigLIP, arXiv:2106.04560 appendix)."""

    block: PreNormSpec
    home: str = "head"

    def place(self, home: nn.Module) -> None:
        block = self.block
        place(home, f"{self.home}.attention", ProbeAttention(block.hidden, block.heads))
        place_parameter(home, f"{self.home}.probe", torch.empty(1, 1, block.hidden))
        place(home, f"{self.home}.layernorm", nn.LayerNorm(block.hidden, block.eps))
        place(home, f"{self.home}.mlp.fc1", nn.Linear(block.hidden, block.width))
        place(home, f"{self.home}.mlp.fc2", nn.Linear(block.width, block.hidden))

    def pooled(self, home: nn.Module, x: Tensor) -> Tensor:
        head = part(home, self.home)
        p = head.attention(head.probe, x)
        y = ACTIVATIONS[self.block.activation](linears(head.layernorm(p), (head.mlp.fc1,))[0])
        return (p + linears(y, (head.mlp.fc2,))[0])[:, 0]


# -- the tower -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionSpec:
    """A whole tower: `count` equal blocks at `blocks`, norms before and behind them, a pooling."""

    patches: PatchSpec
    block: PreNormSpec
    count: int
    blocks: str = "encoder.layers"
    dropout: float = 0.0
    first_norm: str | None = None
    final_norm: str | None = None
    pooling: Pooling | None = None

    @property
    def hidden(self) -> int:
        return self.block.hidden


@dataclass
class VisionOutput(Output):
    """`last_hidden_state` [B, T, C]; `pooler_output` [B, C] where the model pools.

    `hidden_states`, where asked for: what enters the first block, and what comes out of each.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class VisionTower(Model):
    """Images to hidden states."""

    task = "base"

    def __init__(self, config: Config, spec: VisionSpec) -> None:
        super().__init__(config)
        self.spec = spec
        self.checkpointing = False
        spec.patches.place(self)
        for path in (spec.first_norm, spec.final_norm):
            if path is not None:
                place(self, path, nn.LayerNorm(spec.hidden, spec.block.eps))
        for i in range(spec.count):
            place(self, f"{spec.blocks}.{i}", PreNormBlock(spec.block))
        if spec.pooling is not None:
            spec.pooling.place(self)

    @property
    def trunk(self) -> VisionTower:
        return self

    @property
    def layer_count(self) -> int:
        return self.spec.count

    def get_input_embeddings(self) -> nn.Module:
        return part(self, self.spec.patches.projection)

    def states(self, x: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
        """`x` [B, T, C] as it enters the first block, and as it comes out of each."""
        layout = ops.Layout(keep=None if keep is None or bool(keep.all()) else keep.bool())
        yield x
        for i in range(self.spec.count):
            block = part(self, f"{self.spec.blocks}.{i}")
            x = run_block(block, x, layout, self.checkpointing and self.training)
            yield x

    def embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """Images [B, channels, height, width] → what enters the first block [B, T, C].

        Options as for `PatchSpec.tokens`.
        """
        x = self.spec.patches.tokens(self, pixel_values, **options)
        x = F.dropout(x, self.spec.dropout, self.training)
        return part(self, self.spec.first_norm)(x) if self.spec.first_norm else x

    def normed(self, x: Tensor) -> Tensor:
        """The final norm, where the family has one."""
        return part(self, self.spec.final_norm)(x) if self.spec.final_norm else x

    def features(self, pixel_values: Tensor, layer: int, **options: Any) -> Tensor:
        """Hidden states [B, T, C] of one layer, before any final norm; the others behind it are
        not computed.

        `layer` counts as in `hidden_states`: 0 enters the first block, -1 leaves the last.
        """
        count = self.spec.count
        if not -count - 1 <= layer <= count:
            raise ConfigError(f"layer {layer}: there are {count} blocks")
        wanted = layer % (count + 1)
        x = self.embed(pixel_values, **options)
        return next(state for i, state in enumerate(self.states(x)) if i == wanted)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        patch_positions: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> VisionOutput:
        """`pixel_values` [B, channels, height, width].

        `bool_masked_pos` [B, N]: True where a patch is hidden. For images padded to one size:
        `patch_positions` [B, N], each patch's place among the learned positions, and `patch_mask`
        [B, N], False where a patch is padding.
        """
        x = self.embed(
            pixel_values,
            interpolate=interpolate_pos_encoding,
            masked=bool_masked_pos,
            places=patch_positions,
        )
        if patch_mask is not None:
            patch_mask = F.pad(patch_mask.bool(), (x.shape[1] - patch_mask.shape[1], 0), value=True)
        kept: list[Tensor] = []
        for state in self.states(x, patch_mask):
            x = state
            if output_hidden_states:
                kept.append(state)
        x = self.normed(x)
        pooled = None if self.spec.pooling is None else self.spec.pooling.pooled(self, x)
        return VisionOutput(x, pooled, tuple(kept) if output_hidden_states else None)
