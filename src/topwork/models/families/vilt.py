"""ViLT: words and patches in one stream of a ViT, for answers to questions about images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.base import Model
from topwork.models.config import Config, ConfigReader
from topwork.models.families._vision import pair
from topwork.models.families.vit import NAMES
from topwork.models.heads import ClassifierOutput, label_count
from topwork.models.packing import Padding
from topwork.models.prenorm import PreNormBlock, PreNormSpec, run_block
from topwork.nn.paths import part, place, place_parameter
from topwork.weights import Table

CASES: list[dict[str, Any]] = [
    {},
    {"hidden_act": "gelu_new", "layer_norm_eps": 0.1, "qkv_bias": False, "num_channels": 1},
    {"type_vocab_size": 3, "modality_type_vocab_size": 3, "num_attention_heads": 2,
     "patch_size": 8, "max_position_embeddings": 30},
]  # fmt: skip


@dataclass(frozen=True)
class ViltSpec:
    """The sizes of both kinds of tokens, and their common block."""

    vocab: int
    context: int
    types: int
    kinds: int
    channels: int
    image: tuple[int, int]
    patch: tuple[int, int]
    block: PreNormSpec
    count: int
    dropout: float

    @property
    def hidden(self) -> int:
        return self.block.hidden


WORDS = "embeddings.text_embeddings"
PATCHES = "embeddings.patch_embeddings.projection"


class ViltTrunk(nn.Module):
    """Words and patches to hidden states; what is padding is not computed."""

    embedding = f"{WORDS}.word_embeddings"

    def __init__(self, spec: ViltSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpointing = False
        size, eps = spec.hidden, spec.block.eps
        place(self, f"{WORDS}.word_embeddings", nn.Embedding(spec.vocab, size))
        place(self, f"{WORDS}.position_embeddings", nn.Embedding(spec.context, size))
        place(self, f"{WORDS}.token_type_embeddings", nn.Embedding(spec.types, size))
        place(self, f"{WORDS}.LayerNorm", nn.LayerNorm(size, eps))
        place(self, PATCHES, nn.Conv2d(spec.channels, size, spec.patch, spec.patch))
        place_parameter(self, "embeddings.cls_token", torch.zeros(1, 1, size))
        places = (spec.image[0] // spec.patch[0]) * (spec.image[1] // spec.patch[1])
        place_parameter(self, "embeddings.position_embeddings", torch.zeros(1, places + 1, size))
        place(self, "embeddings.token_type_embeddings", nn.Embedding(spec.kinds, size))
        for i in range(spec.count):
            place(self, f"encoder.layer.{i}", PreNormBlock(spec.block))
        place(self, "layernorm", nn.LayerNorm(size, eps))
        place(self, "pooler.dense", nn.Linear(size, size))

    def words(self, ids: Tensor, types: Tensor | None) -> Tensor:
        """ids [B, T] → [B, T, C]."""
        home, longest = part(self, WORDS), ids.shape[1]
        if longest > self.spec.context:
            raise ConfigError(
                f"a question of {longest} tokens: this model reads at most {self.spec.context}; "
                "cut it with truncation=True"
            )
        x = home.word_embeddings(ids)
        kinds = home.token_type_embeddings
        x = x + (kinds.weight[0] if types is None else kinds(types))
        x = x + home.position_embeddings.weight[:longest]
        x = F.dropout(home.LayerNorm(x), self.spec.dropout, self.training)
        return x + part(self, "embeddings.token_type_embeddings").weight[0]

    def patches(self, pixels: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Each image's tokens [N, C], behind a first one: those of its real patches, with places
        drawn from between the learned ones."""
        spec, home = self.spec, part(self, "embeddings")
        if pixels.dim() != 4 or pixels.shape[1] != spec.channels:
            raise ConfigError(
                f"pixel_values {list(pixels.shape)} must be [batch, {spec.channels}, height, width]"
            )
        project = part(self, PATCHES)
        grid = project(pixels.to(project.weight.dtype))  # [B, C, down, across]
        if mask is None:
            mask = pixels.new_ones(len(pixels), *pixels.shape[2:])
        real = F.interpolate(mask[:, None].float(), size=grid.shape[2:])[:, 0].long()
        own = spec.image[0] // spec.patch[0], spec.image[1] // spec.patch[1]
        table = home.position_embeddings[0]
        spread = table[1:].T.view(1, -1, *own)
        kind = home.token_type_embeddings.weight[1]
        rows = []
        for image, seen in zip(grid, real):
            down, across = int(seen[:, 0].sum()), int(seen[0].sum())
            places = F.interpolate(spread, (down, across), mode="bilinear", align_corners=True)[0]
            x = (image[:, :down, :across] + places).flatten(1).T
            x = torch.cat((home.cls_token[0] + table[:1], x))
            rows.append(F.dropout(x, spec.dropout, self.training) + kind)
        return rows

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Hidden states of texts and their images, packed [1, N, C], and their lengths."""
        if len(pixel_values) != len(input_ids):
            raise ConfigError(f"{len(input_ids)} questions, but {len(pixel_values)} images")
        words = self.words(input_ids, token_type_ids)
        images = self.patches(pixel_values, pixel_mask)
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(keep.any(1).all()):
            raise ConfigError("attention_mask marks every token of a question as padding")
        texts = words[keep.bool()].split(Padding.of(keep).lengths)
        x = torch.cat([t for pair in zip(texts, images) for t in pair])[None]
        lengths = tuple(len(a) + len(b) for a, b in zip(texts, images))
        for block in part(self, "encoder.layer"):
            again = self.checkpointing and self.training
            x = run_block(block, x, ops.Layout(lengths), again)
        return part(self, "layernorm")(x), lengths

    def pooled(self, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """tanh(dense(first word)) of each text [B, C]."""
        firsts = torch.tensor([0, *lengths[:-1]], device=x.device).cumsum(0)
        return torch.tanh(part(self, "pooler.dense")(x[0, firsts]))


class ViltAnswerer(Model):
    """An answer, of those that the labels name, to a question about an image."""

    task = "visual-question-answering"

    def __init__(self, config: Config, spec: ViltSpec) -> None:
        super().__init__(config)
        self.vilt = ViltTrunk(spec)
        wide = 2 * spec.hidden
        self.classifier = nn.Sequential(
            nn.Linear(spec.hidden, wide), nn.LayerNorm(wide), nn.GELU(),
            nn.Linear(wide, label_count(config)),
        )  # fmt: skip
        drop = (r"embeddings\.position_ids$", r"^(mlm_score|itm_score|rank_output)\.")
        self.table = Table(drop=drop, prefix="vilt.", fresh=(r"^classifier\.",))

    @property
    def trunk(self) -> ViltTrunk:
        return self.vilt

    @property
    def layer_count(self) -> int:
        return self.vilt.spec.count

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ClassifierOutput:
        """`labels` [B, answers]: how well each answer fits, from 0 to 1."""
        if input_ids is None or pixel_values is None:
            missing = "question: input_ids" if input_ids is None else "image: pixel_values"
            raise ConfigError(f"there is no {missing} is None")
        x, lengths = self.vilt(input_ids, attention_mask, token_type_ids, pixel_values, pixel_mask)
        logits = self.classifier(self.vilt.pooled(x, lengths))
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
            loss = loss * labels.shape[1]
        return ClassifierOutput(loss, logits)


def spec_of(read: ConfigReader) -> ViltSpec:
    read.only("max_image_length", -1)  # else patches are drawn, others at each call
    read.ignore("num_images", "tie_word_embeddings", "gradient_checkpointing")
    dropout = read.rate("hidden_dropout_prob")
    block = PreNormSpec(
        read("hidden_size", 768),
        read("num_attention_heads", 12),
        read("intermediate_size", 3072),
        read("hidden_act", "gelu"),
        read("layer_norm_eps", 1e-12),
        dropout,
        bool(read("qkv_bias", True)),
        attention_dropout=read.rate("attention_probs_dropout_prob"),
        names=NAMES,
    )
    return ViltSpec(
        read("vocab_size", 30522),
        read("max_position_embeddings", 40),
        read("type_vocab_size", 2),
        read("modality_type_vocab_size", 2),
        read("num_channels", 3),
        pair(read("image_size", 384)),
        pair(read("patch_size", 32)),
        block,
        read("num_hidden_layers", 12),
        dropout,
    )


MODELS = {
    "visual-question-answering": lambda config, read: ViltAnswerer(config, spec_of(read)),
}
