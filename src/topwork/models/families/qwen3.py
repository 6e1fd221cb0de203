"""Qwen 3 (dense): Qwen 2 without biases, with a norm on each query and key head."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import llama_like, rms, windows_by_layer
from topwork.nn.layers import QkNorm

CASES = [
    {"head_dim": 24},
    {"head_dim": 16, "attention_bias": True, "rms_norm_eps": 0.05},
    {"head_dim": 16, "use_sliding_window": True, "sliding_window": 3,
     "layer_types": ["sliding_attention", "full_attention"]},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias = read("attention_bias", False)
    return llama_like(
        read,
        windows=windows_by_layer(read),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QkNorm(rms(read)),
        head_dim=128,
        answers="transformer",
    )
