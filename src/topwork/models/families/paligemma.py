"""PaliGemma 1 and 2: SigLIP's patches before a Gemma whose prompt sees all of itself."""

from typing import Any

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
from topwork.models.multimodal import ImageTextSpec, Prefix
from topwork.models.sights import LinearProjector, TowerSight

CASES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "image_token_index": 61},
    {"text_config": {"model_type": "gemma2", "sliding_window": 3, "final_logit_softcapping": 0.5,
                     "query_pre_attn_scalar": 24}},
]  # fmt: skip


def image_text(read: ConfigReader) -> ImageTextSpec:
    _, decoder = text_part(read, ("gemma", "gemma2"))
    vision, tower = vision_part(read, ("siglip_vision_model",))
    decoder = tying(decoder, bool(read("tie_word_embeddings", True)))
    read.ignore("vocab_size", "ignore_index", "hidden_size", "projection_dim")
    projector = LinearProjector(tower.hidden, decoder.hidden, "multi_modal_projector.linear")
    return ImageTextSpec(
        decoder,
        TowerSight(tower, vision.config, projector),
        read("image_token_id", read("image_token_index", 256000)),
        "language_model.model",
        "language_model.lm_head",
        table(decoder, (*NEWER, *BARE_TOWER)),
        ahead=Prefix(),
    )


MODELS = image_text_models(image_text)
