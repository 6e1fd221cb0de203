"""CLIP's vision tower, as LLaVA looks through it."""

from topwork.models.config import ConfigReader
from topwork.models.families._clip import block, vision_models, vision_spec
from topwork.models.vision import NormedFirst, VisionSpec

CASES = [
    {},
    {"hidden_act": "gelu", "layer_norm_eps": 0.1, "num_channels": 1, "image_size": 32},
    {"patch_size": 8, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 3},
]


def tower(read: ConfigReader) -> VisionSpec:
    read.ignore("projection_dim")
    made = block(read, "quick_gelu", 1e-5, False, (768, 12, 3072))
    return vision_spec(
        read, made, 32, NormedFirst(made.hidden, made.eps),
        first="embeddings.class_embedding", first_norm="pre_layrnorm",
    )  # fmt: skip


MODELS = vision_models(tower)
