"""OLMo: norms without parameters, clipped queries, keys and values."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import head_size, llama_like, read_rotary
from topwork.nn.norms import NormSpec

CASES = [
    {},
    {"clip_qkv": 0.3},
    {"attention_bias": True, "tie_word_embeddings": True, "rope_theta": 100.0},
    {"hidden_act": "gelu", "num_attention_heads": 4, "num_key_value_heads": 2},
]


def spec(read: ConfigReader) -> DecoderSpec:
    bias = read("attention_bias", False)
    return llama_like(
        read,
        norm=NormSpec("plain-layer", 1e-5),
        rotary=read_rotary(read, head_size(read), wide=True),
        qkv_bias=bias,
        out_bias=bias,
        attention={"clip": read("clip_qkv")},
    )
