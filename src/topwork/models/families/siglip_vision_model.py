"""SigLIP's vision tower, without a first token, as PaliGemma looks through it."""

from topwork.models.config import ConfigReader
from topwork.models.families._clip import block, vision_models, vision_spec
from topwork.models.vision import ProbePooling, VisionSpec

CASES = [
    {},
    {"hidden_act": "gelu", "layer_norm_eps": 0.1, "num_channels": 1, "image_size": 32},
    {"patch_size": 8, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 3},
    {"vision_use_head": False},
]


def tower(read: ConfigReader) -> VisionSpec:
    made = block(read, "gelu_pytorch_tanh", 1e-6, False, (768, 12, 3072))
    pooling = ProbePooling(made) if read("vision_use_head", True) else None
    return vision_spec(read, made, 16, pooling, final_norm="post_layernorm")


MODELS = vision_models(tower)
