"""Images and texts in one space: a tower for each, and how well they fit (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError, nearest
from topwork.models.base import Model
from topwork.models.config import Config
from topwork.models.output import Output
from topwork.models.prenorm import PreNormBlock, PreNormSpec, run_block
from topwork.models.vision import VisionOutput, VisionSpec, VisionTower
from topwork.nn.paths import part, place
from topwork.weights import Table

WORDS, POSITIONS = "embeddings.token_embedding", "embeddings.position_embedding"
BLOCKS, NORM = "encoder.layers", "final_layer_norm"


class TextPooling(Protocol):
    """How the tokens of a text become one vector."""

    def place(self, home: nn.Module) -> None:
        """Put its parameters into the tower."""

    def pooled(self, home: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        """x [B, T, C] of `ids` [B, T] → [B, C]."""
        ...


@dataclass(frozen=True)
class EndToken:
    """The state of the text's first end token; `end` None: of the token with the highest id, as in
    the first files of CLIP, whose configuration names a wrong one."""

    end: int | None

    def place(self, home: nn.Module) -> None:
        """It has no parameters."""

    def pooled(self, home: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        marks = ids if self.end is None else (ids == self.end).int()
        return x[torch.arange(len(x), device=x.device), marks.argmax(-1)]


@dataclass(frozen=True)
class LastToken:
    """A linear of the last token's state, be it padding (SigLIP)."""

    hidden: int
    width: int
    path: str = "head"

    def place(self, home: nn.Module) -> None:
        place(home, self.path, nn.Linear(self.hidden, self.width))

    def pooled(self, home: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        return part(home, self.path)(x[:, -1])


@dataclass(frozen=True)
class TextSpec:
    """A text tower of `count` equal blocks; `pad` is what texts are padded with."""

    vocab: int
    context: int
    block: PreNormSpec
    count: int
    pooling: TextPooling

    @property
    def hidden(self) -> int:
        return self.block.hidden


class TextTower(Model):
    """Token ids to hidden states."""

    task = "base"

    def __init__(self, config: Config, spec: TextSpec) -> None:
        super().__init__(config)
        self.spec = spec
        self.checkpointing = False
        place(self, WORDS, nn.Embedding(spec.vocab, spec.hidden))
        place(self, POSITIONS, nn.Embedding(spec.context, spec.hidden))
        for i in range(spec.count):
            place(self, f"{BLOCKS}.{i}", PreNormBlock(spec.block))
        place(self, NORM, nn.LayerNorm(spec.hidden, spec.block.eps))
        spec.pooling.place(self)

    @property
    def trunk(self) -> TextTower:
        return self

    @property
    def layer_count(self) -> int:
        return self.spec.count

    def get_input_embeddings(self) -> nn.Module:
        return part(self, WORDS)

    def states(self, x: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        """`x` [B, T, C] as it enters the first block, and as it comes out of each."""
        layout = ops.Layout(keep=None if keep is None or bool(keep.all()) else keep.bool())
        yield x
        for i in range(self.spec.count):
            block = part(self, f"{BLOCKS}.{i}")
            x = run_block(block, x, layout, self.checkpointing and self.training)
            yield x

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> VisionOutput:
        """`input_ids` [B, T]; `attention_mask` [B, T], 1 where a token is real."""
        tokens, room = input_ids.shape[1], self.spec.context
        if tokens > room:
            raise ConfigError(
                f"a text of {tokens} tokens is longer than the {room} positions of this "
                f"{self.config.model_type}; cut it with truncation=True, max_length={room}"
            )
        if position_ids is None:
            position_ids = torch.arange(tokens, device=input_ids.device)
        x = part(self, WORDS)(input_ids) + part(self, POSITIONS)(position_ids)
        kept: list[Tensor] = []
        for state in self.states(x, attention_mask):
            x = state
            if output_hidden_states:
                kept.append(state)
        x = part(self, NORM)(x)
        pooled = self.spec.pooling.pooled(self, x, input_ids)
        return VisionOutput(x, pooled, tuple(kept) if output_hidden_states else None)


def softmax_loss(logits: Tensor) -> Tensor:
    """Of `logits` [N, N] of texts and images, where each belongs to its own: the mean of both
    cross-entropies (arXiv:2103.00020, figure 3)."""
    own = torch.arange(len(logits), device=logits.device)
    logits = logits.float()
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Each pair by itself: does it belong together (arXiv:2303.15343, algorithm 1)?"""
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits.float()).sum(-1).mean()


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


@dataclass(frozen=True)
class DualSpec:
    """Two towers. `projection`: the width of linears that bring them into one space (None: their
    poolings do). `loss`: one of `LOSSES`; `scale` is what the logits' learned factor begins with
    (its logarithm, of shape `scale_shape`), and with `bias` a learned constant is added."""

    vision: VisionSpec
    text: TextSpec
    projection: int | None
    loss: str
    scale: float
    scale_shape: tuple[int, ...] = ()
    bias: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r} is not known{nearest(self.loss, LOSSES)}")


@dataclass
class DualOutput(Output):
    """`logits_per_image` [images, texts], its transpose, and the unit vectors they come from."""

    loss: Tensor | None
    logits_per_image: Tensor
    logits_per_text: Tensor
    text_embeds: Tensor
    image_embeds: Tensor
    text_model_output: VisionOutput
    vision_model_output: VisionOutput


class DualModel(Model):
    """A vision tower, a text tower and the space they share."""

    task = "zero-shot-image-classification"

    def __init__(
        self, config: Config, spec: DualSpec, parts: dict[str, Config], table: Table
    ) -> None:
        super().__init__(config)
        self.spec, self.table = spec, table
        self.text_model = TextTower(parts["text"], spec.text)
        self.vision_model = VisionTower(parts["vision"], spec.vision)
        if spec.projection is not None:
            self.visual_projection = nn.Linear(spec.vision.hidden, spec.projection, bias=False)
            self.text_projection = nn.Linear(spec.text.hidden, spec.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.full(spec.scale_shape, spec.scale))
        if spec.bias:
            self.logit_bias = nn.Parameter(torch.zeros(spec.scale_shape))

    @property
    def trunk(self) -> VisionTower:
        """The vision tower."""
        return self.vision_model

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self.vision_model.checkpointing = self.text_model.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.vision_model.checkpointing = self.text_model.checkpointing = False

    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """One vector [B, P] per image in the shared space, not yet of unit length."""
        return self._projected_image(self.vision_model(pixel_values, interpolate_pos_encoding))

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """One vector [B, P] per text in the shared space, not yet of unit length."""
        return self._projected_text(self.text_model(input_ids, attention_mask, position_ids))

    def _projected_image(self, output: VisionOutput) -> Tensor:
        pooled = output.pooler_output
        assert pooled is not None
        return pooled if self.spec.projection is None else self.visual_projection(pooled)

    def _projected_text(self, output: VisionOutput) -> Tensor:
        pooled = output.pooler_output
        assert pooled is not None
        return pooled if self.spec.projection is None else self.text_projection(pooled)

    def logits_of(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """How well [images, P] and [texts, P] of unit length fit: [images, texts]."""
        logits = image_embeds @ text_embeds.T * self.logit_scale.exp()
        return logits + self.logit_bias if self.spec.bias else logits

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = False,
        interpolate_pos_encoding: bool = False,
    ) -> DualOutput:
        """Texts [M, T] and images [N, channels, height, width]; with `return_loss`, the i-th text
        belongs to the i-th image."""
        vision = self.vision_model(pixel_values, interpolate_pos_encoding)
        text = self.text_model(input_ids, attention_mask, position_ids)
        images = unit(self._projected_image(vision))
        texts = unit(self._projected_text(text))
        logits = self.logits_of(images, texts)
        loss = None
        if return_loss:
            if len(images) != len(texts):
                raise ConfigError(
                    f"return_loss=True pairs texts and images one to one, got {len(texts)} texts "
                    f"and {len(images)} images"
                )
            loss = LOSSES[self.spec.loss](logits.T)
        return DualOutput(loss, logits, logits.T, texts, images, text, vision)


def unit(x: Tensor) -> Tensor:
    """x [..., P] at length one."""
    return x / x.norm(dim=-1, keepdim=True)
