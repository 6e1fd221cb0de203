"""CLIP: images and texts in one space, learned from pairs (arXiv:2103.00020)."""

from topwork.models.config import ConfigReader
from topwork.models.contrastive import DualSpec
from topwork.models.families import clip_text_model, clip_vision_model
from topwork.models.families._clip import INITS, dual_models

CASES = [
    {},
    {"projection_dim": 20, "logit_scale_init_value": 1.5,
     "text_config": clip_text_model.CASES[1], "vision_config": clip_vision_model.CASES[1]},
    {"text_config": clip_text_model.CASES[2], "vision_config": clip_vision_model.CASES[2]},
]  # fmt: skip


def whole(read: ConfigReader, vision: ConfigReader, text: ConfigReader) -> DualSpec:
    read.ignore(*INITS)
    return DualSpec(
        clip_vision_model.tower(vision),
        clip_text_model.tower(text),
        read("projection_dim", 512),
        "softmax",
        float(read("logit_scale_init_value", 2.6592)),
    )


MODELS = dual_models(clip_vision_model.tower, whole)
