"""Idefics 3: tiles of an image through SigLIP, squares of patches as one token of a Llama."""

from typing import Any

from topwork.models.config import ConfigReader
from topwork.models.families._clip import block, vision_spec
from topwork.models.families._multimodal import image_text_models, table, text_part, tying
from topwork.models.multimodal import ImageTextSpec
from topwork.models.sights import LinearProjector, TileSight
from topwork.models.vision import VisionSpec
from topwork.weights import Rename

CASES: list[dict[str, Any]] = [
    {},
    {"scale_factor": 4, "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 0.1}},
    {"tie_word_embeddings": True, "scale_factor": 1},
]


def tower_spec(read: ConfigReader) -> VisionSpec:
    made = block(read, "gelu_pytorch_tanh", 1e-6, False, (1152, 16, 3072))
    read.ignore("tie_word_embeddings", "use_base_siglip", "size", "max_image_size")
    return vision_spec(read, made, 32, None, final_norm="post_layernorm")


def image_text(read: ConfigReader) -> ImageTextSpec:
    _, decoder = text_part(read, ())
    vision = read.part("vision_config", model_type=f"{read.model_type}_vision")
    tower = tower_spec(vision)
    decoder = tying(decoder, bool(read("tie_word_embeddings", False)) or decoder.tied)
    read.ignore("image_seq_len", "vocab_size", "_pad_token_id")
    projector = LinearProjector(
        tower.hidden,
        decoder.hidden,
        "model.connector.modality_projection.proj",
        bias=False,
        shuffle=read("scale_factor", 2),
    )
    return ImageTextSpec(
        decoder,
        TileSight(tower, vision.config, projector),
        read("image_token_id", 128257),
        "model.text_model",
        "lm_head",
        table(decoder, (Rename("^model.text_model.lm_head", "^lm_head"),)),
    )


MODELS = image_text_models(image_text)
