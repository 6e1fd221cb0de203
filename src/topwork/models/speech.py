"""An encoder of raw sound (wav2vec 2.0, HuBERT), built from a spec.

x = project(norm(convolutions(samples)));   x = x + act(places(x));   blocks;   maybe an adapter
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.base import Model
from topwork.models.config import Config
from topwork.models.output import Output
from topwork.models.packing import Padding
from topwork.nn.convs import SpeechConv, TunedConv1d, frames_after
from topwork.nn.layers import ACTIVATIONS, linears
from topwork.nn.spans import Augment
from topwork.ops.recompute import recomputed
from topwork.weights import Rename, Table


@dataclass(frozen=True)
class ConvStack:
    """The convolutions over the samples. `norm`: "group" on the first one, "layer" on all."""

    sizes: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    bias: bool
    norm: str
    activation: str


@dataclass(frozen=True)
class Shortener:
    """Convolutions with gates behind the blocks, each of which leaves one of `stride` frames."""

    size: int
    kernel: int
    stride: int
    count: int


@dataclass(frozen=True)
class SpeechSpec:
    """A whole encoder of raw sound.

    `norm_first`: norms stand before each part and at the end, else behind each addition. `places`:
    kernel and groups of the convolution that tells positions. `bottleneck`: the width of a small
    network behind each block (MMS). `norm_features`: whether the convolutions' output is normed.
    """

    prefix: str
    convs: ConvStack
    hidden: int
    heads: int
    width: int
    count: int
    activation: str
    eps: float
    norm_first: bool
    places: tuple[int, int]
    augment: Augment | None
    has_mask: bool
    shortener: Shortener | None = None
    bottleneck: int | None = None
    norm_features: bool = True
    dropout: float = 0.0
    inner_dropout: float = 0.0
    feature_dropout: float = 0.0
    layer_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def output(self) -> int:
        return self.hidden if self.shortener is None else self.shortener.size


class Features(nn.Module):
    """Samples to frames."""

    def __init__(self, spec: ConvStack) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        norms = [spec.norm if spec.norm == "layer" or i == 0 else None for i in range(99)]
        inputs = (1, *spec.sizes)
        self.conv_layers = nn.ModuleList(
            SpeechConv((inputs[i], size), kernel, stride, spec.bias, norms[i])
            for i, (size, kernel, stride) in enumerate(zip(spec.sizes, spec.kernels, spec.strides))
        )

    def forward(self, samples: Tensor) -> Tensor:
        """[B, N] → [B, T, C]."""
        x = samples[:, None]
        for layer in self.conv_layers:
            x = self.activation(layer(x))
        return x.transpose(1, 2)


class Projection(nn.Module):
    """Frames as the convolutions give them to the width of the blocks."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()
        size = spec.convs.sizes[-1]
        self.layer_norm = nn.LayerNorm(size, spec.eps) if spec.norm_features else None
        self.projection = nn.Linear(size, spec.hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, F] → [B, T, C], and the frames with their norm."""
        x = x if self.layer_norm is None else self.layer_norm(x)
        return self.projection(x), x


class Heads(nn.Module):
    """Self-attention of one block."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()
        self.heads, self.drop = spec.heads, spec.attention_dropout
        self.k_proj = nn.Linear(spec.hidden, spec.hidden)
        self.v_proj = nn.Linear(spec.hidden, spec.hidden)
        self.q_proj = nn.Linear(spec.hidden, spec.hidden)
        self.out_proj = nn.Linear(spec.hidden, spec.hidden)

    def forward(self, x: Tensor, layout: ops.Layout) -> Tensor:
        parts = linears(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in parts)
        drop = self.drop if self.training else 0.0
        rule = ops.Rule(q.shape[-1] ** -0.5, causal=False, dropout=drop)
        return linears(ops.attention(q, k, v, layout, rule).flatten(2), (self.out_proj,))[0]


class Feed(nn.Module):
    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()
        self.spec = spec
        self.intermediate_dense = nn.Linear(spec.hidden, spec.width)
        self.output_dense = nn.Linear(spec.width, spec.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = ACTIVATIONS[self.spec.activation](linears(x, (self.intermediate_dense,))[0])
        x = F.dropout(x, self.spec.inner_dropout, self.training)
        x = linears(x, (self.output_dense,))[0]
        return F.dropout(x, self.spec.dropout, self.training)


class Bottleneck(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.linear_1 = nn.Linear(hidden, width)
        self.linear_2 = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.relu(self.linear_1(self.norm(x))))


class SpeechBlock(nn.Module):
    """Attention and the feed-forward part, with norms before or behind them."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attention = Heads(spec)
        self.layer_norm = nn.LayerNorm(spec.hidden, spec.eps)
        self.feed_forward = Feed(spec)
        self.final_layer_norm = nn.LayerNorm(spec.hidden, spec.eps)
        if spec.bottleneck is not None:
            self.adapter_layer = Bottleneck(spec.hidden, spec.bottleneck)

    def forward(self, x: Tensor, layout: ops.Layout) -> Tensor:
        first = self.spec.norm_first
        y = self.attention(self.layer_norm(x) if first else x, layout)
        x = x + F.dropout(y, self.spec.dropout, self.training)
        if first:
            x = x + self.feed_forward(self.final_layer_norm(x))
            return x if self.spec.bottleneck is None else x + self.adapter_layer(x)
        x = self.layer_norm(x)
        return self.final_layer_norm(x + self.feed_forward(x))


class Places(nn.Module):
    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()
        self.conv = TunedConv1d(spec.hidden, *spec.places)
        self.activation = ACTIVATIONS[spec.convs.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Blocks(nn.Module):
    """Frames to states; `checkpointing` keeps only each block's input for the backward pass."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpointing = False
        self.pos_conv_embed = Places(spec)
        self.layer_norm = nn.LayerNorm(spec.hidden, spec.eps)
        self.layers = nn.ModuleList(SpeechBlock(spec) for _ in range(spec.count))

    def forward(
        self, x: Tensor, rows: Padding | None, states: list[Tensor] | None = None
    ) -> Tensor:
        """x [B, T, C], zeros where there is padding → [B, T, C] (then too).

        Frames that are padding take no part; `states` is filled with what each block is given.
        """
        x = x + self.pos_conv_embed(x)
        x = x if self.spec.norm_first else self.layer_norm(x)
        x = F.dropout(x, self.spec.dropout, self.training)
        x, lengths = (x, None) if rows is None else (rows.pack(x), rows.lengths)
        layout, seen = ops.Layout(lengths), []
        for layer in self.layers:
            seen.append(x)
            if self.training and float(torch.rand(())) < self.spec.layer_dropout:
                continue
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = recomputed(layer, x, layout)
            else:
                x = layer(x, layout)
        if states is not None:
            states += [s if rows is None else rows.unpack(s) for s in (*seen, x)]
        x = self.layer_norm(x) if self.spec.norm_first else x
        return x if rows is None else rows.unpack(x)


class Gate(nn.Module):
    def __init__(self, spec: Shortener) -> None:
        super().__init__()
        self.conv = nn.Conv1d(spec.size, 2 * spec.size, spec.kernel, spec.stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x), dim=1)


class Shorter(nn.Module):
    """The convolutions with gates behind the blocks."""

    def __init__(self, spec: Shortener, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.narrow = spec.size != hidden
        if self.narrow:
            self.proj = nn.Linear(hidden, spec.size)
            self.proj_layer_norm = nn.LayerNorm(spec.size)
        self.layers = nn.ModuleList(Gate(spec) for _ in range(spec.count))

    def forward(self, x: Tensor, sizes: list[int] | None) -> tuple[Tensor, list[int] | None]:
        """[B, T, C] → [B, T', C'], zeros where there is padding, and how many of T' are real."""
        if self.narrow:
            x = self.proj_layer_norm(self.proj(x))
        x, spec = real_frames(x, sizes), self.spec
        for layer in self.layers:
            x = layer(x.transpose(1, 2)).transpose(1, 2)
            if sizes is not None:
                sizes = [(n + 2 - spec.kernel) // spec.stride + 1 for n in sizes]
            x = real_frames(x, sizes)
        return x, sizes


def real_frames(x: Tensor, sizes: list[int] | None) -> Tensor:
    """x [B, T, C] with zeros from each row's size on."""
    if sizes is None or min(sizes) == x.shape[1]:
        return x
    ends = torch.tensor(sizes, device=x.device)[:, None, None]
    return x * (torch.arange(x.shape[1], device=x.device)[:, None] < ends)


def names_on_disk(prefix: str, own: tuple[str, ...]) -> Table:
    """Where the tensors stand, whichever head the file was saved with; `own` heads may be fresh.

    The convolution that tells positions is stored as weight_g and weight_v, in newer files under
    torch's names for a parametrization.
    """
    heads = ("lm_head", "projector", "classifier", "layer_weights", "quantizer", "project_q",
             "project_hid", "tdnn", "feature_extractor_xvector", "objective")  # fmt: skip
    mask = r"masked_spec_embed$"
    return Table(
        old=(
            Rename("parametrizations.weight.original0", "weight_g"),
            Rename("parametrizations.weight.original1", "weight_v"),
        ),
        drop=(*(rf"^{head}(\.|$)" for head in heads if head not in own), mask),
        prefix=f"{prefix}.",
        fresh=(*(rf"^{head}(\.|$)" for head in own), mask),
    )


@dataclass
class SpeechOutput(Output):
    """`last_hidden_state` [B, T, C]; `extract_features` [B, T, F], the normed frames below."""

    last_hidden_state: Tensor
    extract_features: Tensor


@dataclass
class Heard:
    """States [B, T, C], the frames below, and how many states of each row are real (None: all)."""

    hidden: Tensor
    features: Tensor
    sizes: list[int] | None


class SpeechEncoder(Model):
    """Samples of sound to a state every few milliseconds."""

    def __init__(self, config: Config, spec: SpeechSpec) -> None:
        super().__init__(config)
        self.spec = spec
        self.table = names_on_disk(spec.prefix, ())
        self.feature_extractor = Features(spec.convs)
        self.feature_projection = Projection(spec)
        if spec.has_mask:
            self.masked_spec_embed = nn.Parameter(torch.empty(spec.hidden).uniform_())
        self.encoder = Blocks(spec)
        if spec.shortener is not None:
            self.adapter = Shorter(spec.shortener, spec.hidden)

    @property
    def trunk(self) -> Blocks:
        return self.encoder

    @property
    def layer_count(self) -> int:
        return self.spec.count

    def get_input_embeddings(self) -> nn.Module:
        return self.feature_projection.projection

    def freeze_feature_encoder(self) -> None:
        """Keep the convolutions over the samples as they are."""
        self.feature_extractor.requires_grad_(False)

    def frames(self, samples: int) -> int:
        """Frames that the convolutions make of `samples`."""
        return frames_after(samples, self.spec.convs.kernels, self.spec.convs.strides)

    def hear(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Heard:
        """Rows of samples [B, N], padded on the right where `attention_mask` [B, N] is 0.

        `mask_time_indices` [B, T]: frames to hide, in place of those that training draws.
        """
        sizes = self._sizes(input_values, attention_mask)
        features = self.feature_extractor(input_values.to(self.dtype))
        x, features = self.feature_projection(features)
        x = F.dropout(x, self.spec.feature_dropout, self.training)
        x = self._augmented(x, sizes, mask_time_indices)
        rows = None
        if sizes is not None and min(sizes) < x.shape[1]:
            ends = torch.tensor(sizes, device=x.device)[:, None]
            rows = Padding(torch.arange(x.shape[1], device=x.device) < ends, tuple(sizes))
            x = real_frames(x, sizes)
        x = self.encoder(x, rows, states)
        if self.spec.shortener is not None:
            x, sizes = self.adapter(x, sizes)
        return Heard(x, features, sizes)

    def _sizes(self, samples: Tensor, mask: Tensor | None) -> list[int] | None:
        """How many frames of each row are real; ConfigError for a row with none."""
        if samples.dim() != 2:
            raise ConfigError(
                f"input_values must be [batch, samples], got {list(samples.shape)}: mix channels "
                "down to one first"
            )
        lengths = [samples.shape[1]] * len(samples) if mask is None else mask.sum(1).tolist()
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ConfigError("a row is padded on the left; pad sound on the right")
        sizes = [self.frames(int(n)) for n in lengths]
        if 0 in sizes:
            row = sizes.index(0)
            raise ConfigError(
                f"row {row} has {int(lengths[row])} samples, too few to make a frame of"
            )
        return None if mask is None else sizes

    def _augmented(self, x: Tensor, sizes: list[int] | None, hidden: Tensor | None) -> Tensor:
        augment = self.spec.augment
        if augment is None:
            return x
        rows, frames, width = x.shape
        if hidden is None and augment.time is not None and self.training:
            hidden = augment.time.draw(sizes or [frames] * rows, frames, "time")
        if hidden is not None:
            x = torch.where(hidden.to(x.device)[..., None], self.masked_spec_embed.to(x.dtype), x)
        if augment.features is not None and self.training:
            gone = augment.features.draw([width] * rows, width, "feature").to(x.device)
            x = x.masked_fill(gone[:, None], 0.0)
        return x

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
    ) -> SpeechOutput:
        """Rows of samples [B, N] with their mask; padding comes back as zeros."""
        heard = self.hear(input_values, attention_mask, mask_time_indices)
        return SpeechOutput(heard.hidden, heard.features)
