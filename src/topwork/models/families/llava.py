"""LLaVA 1.5: CLIP's patches through a small MLP into a Llama-shaped decoder."""

from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.families._multimodal import (
    BARE_TOWER,
    NEWER,
    image_text_models,
    table,
    text_part,
    tying,
    vision_part,
)
from topwork.models.multimodal import ImageTextSpec
from topwork.models.sights import MlpProjector, TowerSight

TOWERS = ("clip_vision_model", "siglip_vision_model")
CASES: list[dict[str, Any]] = [
    {},
    {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False,
     "projector_hidden_act": "gelu_pytorch_tanh"},
    {"vision_feature_layer": [-2, 1], "tie_word_embeddings": True},
    {"vision_feature_layer": -4, "text_config": {"model_type": "qwen2", "hidden_act": "gelu"}},
    {"vision_feature_layer": -1, "vision_feature_select_strategy": "full",
     "vision_config": {"model_type": "siglip_vision_model"}},
]  # fmt: skip


def image_text(read: ConfigReader) -> ImageTextSpec:
    _, decoder = text_part(read, ())
    vision, tower = vision_part(read, TOWERS)
    tied = bool(read("tie_word_embeddings", False)) or decoder.tied
    decoder = tying(decoder, tied)
    layers = read("vision_feature_layer", -2)
    layers = tuple(layers) if isinstance(layers, list) else (int(layers),)
    strategy = read("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ConfigError(f"vision_feature_select_strategy={strategy!r}: 'default' or 'full'")
    read.ignore("image_seq_length", "vocab_size", "ignore_index", "image_grid_pinpoints")
    projector = MlpProjector(
        tower.hidden * len(layers),
        decoder.hidden,
        read("projector_hidden_act", "gelu"),
        bool(read("multimodal_projector_bias", True)),
    )
    return ImageTextSpec(
        decoder,
        TowerSight(tower, vision.config, projector, layers=layers, skip=int(strategy == "default")),
        read("image_token_id", read("image_token_index", 32000)),
        "language_model.model",
        "language_model.lm_head",
        table(decoder, (*NEWER, *BARE_TOWER)),
    )


MODELS = image_text_models(image_text)
