"""Qwen 2 and 2.5: biases on q, k, v; windows on the later layers."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import llama_like, windows_by_layer

CASES = [
    {},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2},
]


def spec(read: ConfigReader) -> DecoderSpec:
    return llama_like(read, windows=windows_by_layer(read), qkv_bias=True, answers="transformer")
