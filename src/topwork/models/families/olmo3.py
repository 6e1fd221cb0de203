"""OLMo 3: OLMo 2 with three sliding layers to a full one; only the full ones stretch positions."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import POST_NORMS, DecoderSpec
from topwork.models.families._common import (
    every_nth_full,
    head_size,
    layer_types,
    llama_like,
    read_rotaries,
    rms,
    windowed,
)
from topwork.nn.layers import QkNorm

BOTH = ["sliding_attention", "full_attention"]
CASES = [
    {"layer_types": BOTH, "sliding_window": 4},
    {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
    {"layer_types": BOTH, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "gelu",
     "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0,
                           "original_max_position_embeddings": 16},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    {"num_hidden_layers": 4, "sliding_window": 3},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias, norm = read("attention_bias", False), rms(read, "rms-wide", 1e-5)
    kinds = layer_types(read, every_nth_full(read, 4))
    rotaries = read_rotaries(read, head_size(read), theta=5e5, local_theta=5e5, wide=True)
    return llama_like(
        read,
        norm=norm,
        rotary=[rotaries[kind] for kind in kinds],
        windows=windowed(kinds, read("sliding_window", 4096)),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QkNorm(norm, "width"),
        layer={"norms": POST_NORMS},
    )
