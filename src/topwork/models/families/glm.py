"""GLM-4 (first release): interleaved rotary on half of each head, gate and up in one linear."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import gated, head_size, llama_like, read_rotary, rms

CASES = [
    {"head_dim": 16},
    {"head_dim": 8, "attention_bias": False, "partial_rotary_factor": 1.0, "rms_norm_eps": 0.1},
    {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "gelu",
     "tie_word_embeddings": True, "rope_theta": 100.0},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    return llama_like(
        read,
        norm=rms(read, eps=1.5625e-07),
        head_dim=128,
        rotary=read_rotary(read, head_size(read, 128), share=0.5, interleaved=True),
        qkv_bias=read("attention_bias", True),
        mlp=gated(read, fused=True),
    )
