"""Phi-3, Phi-3.5 and Phi-4: q, k, v in one linear, gate and up in another; LongRoPE."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import (
    gated,
    head_size,
    llama_like,
    read_rotary,
    rms,
    same_window,
)

LONG = {
    "type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 8.0, 9.0],
}  # fmt: skip
CASES = [
    {"num_key_value_heads": 5},
    {"sliding_window": 4, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
    {"partial_rotary_factor": 0.5, "hidden_size": 48, "num_attention_heads": 4,
     "num_key_value_heads": 2},
    {"rope_scaling": {**LONG, "original_max_position_embeddings": 32},
     "original_max_position_embeddings": 32},
    {"rope_scaling": {**LONG, "type": "su", "original_max_position_embeddings": 8},
     "original_max_position_embeddings": 8, "hidden_act": "gelu"},
    {"rope_theta": 100.0},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    rotary = read_rotary(
        read, head_size(read), share=1.0, aliases={"su": "longrope", "yarn": "longrope"}
    )
    rate = read.rate("resid_pdrop")
    read.ignore("embd_pdrop", "attention_bias", "rope_theta")  # the peer reads none of them
    return llama_like(
        read,
        norm=rms(read, eps=1e-5),
        rotary=rotary,
        windows=same_window(read),
        mlp=gated(read, fused=True),
        attention={"fused": True},
        layer={"dropout": (rate, rate)},
    )
