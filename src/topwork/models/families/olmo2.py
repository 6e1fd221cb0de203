"""OLMo 2: norms behind the branches alone, and over the whole width of queries and keys."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import POST_NORMS, DecoderSpec
from topwork.models.families._common import head_size, llama_like, read_rotary, rms
from topwork.nn.layers import QkNorm

CASES = [
    {},
    {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
    {"hidden_act": "gelu", "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 100.0},
]


def spec(read: ConfigReader) -> DecoderSpec:
    bias, norm = read("attention_bias", False), rms(read, "rms-wide", 1e-5)
    return llama_like(
        read,
        norm=norm,
        rotary=read_rotary(read, head_size(read), wide=True),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QkNorm(norm, "width"),
        layer={"norms": POST_NORMS},
    )
