"""SigLIP, and SigLIP 2 of fixed size: each pair judged by itself (arXiv:2303.15343)."""

from topwork.models.config import ConfigReader
from topwork.models.contrastive import DualSpec
from topwork.models.families import siglip_text_model, siglip_vision_model
from topwork.models.families._clip import INITS, dual_models

CASES = [
    {},
    {"text_config": siglip_text_model.CASES[1], "vision_config": siglip_vision_model.CASES[1]},
    {"text_config": siglip_text_model.CASES[2], "vision_config": siglip_vision_model.CASES[2]},
]


def whole(read: ConfigReader, vision: ConfigReader, text: ConfigReader) -> DualSpec:
    read.ignore(*INITS)
    return DualSpec(
        siglip_vision_model.tower(vision),
        siglip_text_model.tower(text),
        None,
        "sigmoid",
        0.0,
        (1,),
        bias=True,
    )


MODELS = dual_models(siglip_vision_model.tower, whole)
