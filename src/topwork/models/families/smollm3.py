"""SmolLM3: Llama in which every fourth layer sees no positions."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import (
    gated,
    head_size,
    layer_types,
    llama_like,
    read_rotary,
    windowed,
)

CASES = [
    {"no_rope_layers": [1, 0]},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [0, 1]},
    {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "rope_theta": 100.0},
]


def spec(read: ConfigReader) -> DecoderSpec:
    bias, count = read("attention_bias", False), read.need("num_hidden_layers")
    every = read("no_rope_layer_interval", 4)
    turns = read("no_rope_layers", [int((i + 1) % every != 0) for i in range(count)])
    window = read("sliding_window")
    window = window if read("use_sliding_window", False) else None
    kinds = [
        "sliding_attention" if window is not None and not turn else "full_attention"
        for turn in turns
    ]
    read.ignore("max_window_layers")
    rotary = read_rotary(read, head_size(read), theta=2e6)
    return llama_like(
        read,
        rotary=[rotary if turn else None for turn in turns],
        windows=windowed(layer_types(read, kinds), window),
        qkv_bias=bias,
        out_bias=bias,
        mlp=gated(read, bias=read("mlp_bias", False)),
        tied=True,
        answers="transformer",
    )
