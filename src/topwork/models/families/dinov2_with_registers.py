"""DINOv2 with register tokens behind the first one (arXiv:2309.16588)."""

from topwork.models.config import ConfigReader
from topwork.models.families import dinov2
from topwork.models.families._vision import tower_models
from topwork.models.vision import VisionSpec

CASES = [
    {},
    {"use_swiglu_ffn": True, "mlp_ratio": 3, "layerscale_value": 0.5, "num_register_tokens": 2},
    {"image_size": 32, "patch_size": 8, "hidden_act": "relu", "num_attention_heads": 2,
     "num_register_tokens": 1, "qkv_bias": False},
]  # fmt: skip


def tower(read: ConfigReader) -> VisionSpec:
    return dinov2.tower(read, read("num_register_tokens", 4))


HOME = "dinov2_with_registers"
MODELS = tower_models(HOME, tower, lambda made: dinov2.classes(HOME, made), dinov2.NEWER)
