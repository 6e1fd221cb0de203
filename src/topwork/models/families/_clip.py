"""What CLIP and SigLIP read alike: two towers, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from topwork.models.config import Config, ConfigReader
from topwork.models.contrastive import DualModel, DualSpec, TextSpec, TextTower
from topwork.models.families._vision import pair
from topwork.models.prenorm import PreNormSpec
from topwork.models.vision import PatchSpec, Pooling, VisionSpec, VisionTower
from topwork.models.vision_heads import ClassSpec, ImageClassifier, TowerModel, mean_of_patches
from topwork.weights import Table

BUFFERS = r"embeddings\.position_ids$"
SPACE = r"^(logit_(scale|bias)|(visual|text)_projection\.weight)$"
INITS = ("initializer_factor", "dropout", "gradient_checkpointing")


def block(read: ConfigReader, act: str, eps: float, causal: bool, size: tuple[int, int, int]):
    """A block; `size`: the usual hidden size, heads and width."""
    read.ignore(*INITS)
    return PreNormSpec(
        read("hidden_size", size[0]),
        read("num_attention_heads", size[1]),
        read("intermediate_size", size[2]),
        read("hidden_act", act),
        read("layer_norm_eps", eps),
        causal=causal,
        attention_dropout=read.rate("attention_dropout"),
    )


def vision_spec(
    read: ConfigReader,
    made: PreNormSpec,
    patch: int,
    pooling: Pooling | None,
    first: str | None = None,
    first_norm: str | None = None,
    final_norm: str | None = None,
) -> VisionSpec:
    patches = PatchSpec(
        read("num_channels", 3),
        made.hidden,
        pair(read("image_size", 224)),
        pair(read("patch_size", patch)),
        bias=first is None,
        projection="embeddings.patch_embedding",
        first=first,
        first_shape=(),
        positions="embeddings.position_embedding",
        table=True,
    )
    return VisionSpec(
        patches, made, read("num_hidden_layers", 12), first_norm=first_norm,
        final_norm=final_norm, pooling=pooling,
    )  # fmt: skip


def dual_models(
    vision: Callable[[ConfigReader], VisionSpec], whole: Callable[..., DualSpec]
) -> dict[str, Any]:
    """Both towers together, and a classifier on the vision tower alone.

    `whole(read, vision, text)` reads all three configurations.
    """

    def parts(read: ConfigReader) -> tuple[ConfigReader, ConfigReader]:
        kind = read.model_type
        return (
            read.part("vision_config", "vision_config_dict", model_type=f"{kind}_vision_model"),
            read.part("text_config", "text_config_dict", model_type=f"{kind}_text_model"),
        )

    def dual(config: Config, read: ConfigReader) -> DualModel:
        images, texts = parts(read)
        spec = whole(read, images, texts)
        configs = {"vision": images.config, "text": texts.config}
        return DualModel(config, spec, configs, Table(drop=(BUFFERS,)))

    def classifier(config: Config, read: ConfigReader) -> ImageClassifier:
        spec = vision(read.part("vision_config", "vision_config_dict"))
        read.ignore("text_config", "text_config_dict", "projection_dim", "logit_scale_init_value")
        read.ignore(*INITS)
        gather = mean_of_patches(spec.patches.lead)
        return ImageClassifier(
            config,
            spec,
            ClassSpec("vision_model", gather, spec.hidden),
            Table(drop=(BUFFERS, SPACE, r"^text_model\."), fresh=(r"^classifier\.",)),
        )

    return {
        "base": dual,
        "zero-shot-image-classification": dual,
        "image-classification": classifier,
    }


def _tower_table(home: str, other: str) -> Table:
    return Table(drop=(BUFFERS, SPACE, rf"^{other}\.", r"^classifier\."), prefix=home + ".")


def vision_models(spec: Callable[[ConfigReader], VisionSpec]) -> dict[str, Any]:
    """The vision tower alone, also from the files of both."""

    def bare(config: Config, read: ConfigReader) -> TowerModel:
        tower = VisionTower(config, spec(read))
        return TowerModel(config, tower, "vision_model", _tower_table("vision_model", "text_model"))

    return {"base": bare}


def text_models(spec: Callable[[ConfigReader], TextSpec]) -> dict[str, Any]:
    """The text tower alone, also from the files of both."""

    def bare(config: Config, read: ConfigReader) -> TowerModel:
        tower = TextTower(config, spec(read))
        return TowerModel(config, tower, "text_model", _tower_table("text_model", "vision_model"))

    return {"base": bare}
