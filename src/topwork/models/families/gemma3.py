"""Gemma 3 with images: SigLIP's patches averaged by squares, an image's tokens see each other."""

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
from topwork.models.multimodal import Images, ImageTextSpec
from topwork.models.sights import PooledProjector, TowerSight
from topwork.nn.norms import NormSpec

CASES: list[dict[str, Any]] = [
    {},
    {"mm_tokens_per_image": 1, "tie_word_embeddings": False},
    {"vision_config": {"layer_norm_eps": 0.1}, "text_config": {"sliding_window": 3}},
]


def image_text(read: ConfigReader) -> ImageTextSpec:
    _, decoder = text_part(read, ("gemma3_text",))
    vision, tower = vision_part(read, ("siglip_vision_model",))
    decoder = tying(decoder, bool(read("tie_word_embeddings", True)))
    tokens = read("mm_tokens_per_image", 256)
    side = round(tokens**0.5)
    if side**2 != tokens or tower.patches.grid[0] % side:
        raise ConfigError(
            f"mm_tokens_per_image={tokens} must be a square that divides the "
            f"{tower.patches.grid[0]}² patches"
        )
    read.ignore("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")
    norm = NormSpec("rms-offset", tower.block.eps)
    return ImageTextSpec(
        decoder,
        TowerSight(tower, vision.config, PooledProjector(tower.hidden, decoder.hidden, side, norm)),
        read("image_token_id", read("image_token_index", 262144)),
        "language_model.model",
        "language_model.lm_head",
        table(decoder, (*NEWER, *BARE_TOWER)),
        ahead=Images(),
    )


MODELS = image_text_models(image_text)
