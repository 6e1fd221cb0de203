"""Command R7B: Cohere with three sliding layers to a full one, which sees no positions."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import ONE_NORM, DecoderSpec, HeadSpec
from topwork.models.families._common import (
    every_nth_full,
    head_size,
    layer_types,
    llama_like,
    read_rotary,
    windowed,
)
from topwork.nn.norms import NormSpec

BOTH = ["sliding_attention", "full_attention"]
CASES = [
    {"layer_types": BOTH, "sliding_window": 4},
    {"attention_bias": True, "logit_scale": 0.5, "layer_norm_eps": 0.1, "hidden_act": "gelu"},
    {"layer_types": BOTH[::-1], "sliding_window": 3, "rope_theta": 100.0,
     "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"num_hidden_layers": 4, "sliding_window": 3, "sliding_window_pattern": 3},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias = read("attention_bias", False)
    kinds = layer_types(read, every_nth_full(read, read("sliding_window_pattern", 4)))
    rotary = read_rotary(read, head_size(read), interleaved=True, wide=True)
    read.ignore("rotary_pct", "position_embedding_type", "order_of_interleaved_layers",
                "cache_implementation", "layer_switch", "use_embedding_sharing",
                "use_gated_activation", "use_parallel_block", "use_parallel_embedding",
                "use_qk_norm")  # fmt: skip
    return llama_like(
        read,
        norm=NormSpec("layer", read("layer_norm_eps", 1e-5)),
        rotary=[rotary if kind == "sliding_attention" else None for kind in kinds],
        windows=windowed(kinds, read("sliding_window", 4096)),
        qkv_bias=bias,
        out_bias=bias,
        layer={"norms": ONE_NORM, "parallel": True},
        tied=True,
        head=HeadSpec(scale=read("logit_scale", 0.0625)),
    )
