"""Granite 3: Llama with multipliers on the embedding, the scores, the branches and the logits."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import gated, llama_like, multipliers

CASES = [
    {},
    {"embedding_multiplier": 12.0, "attention_multiplier": 0.3},
    {"residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True, "rope_theta": 100.0, "rms_norm_eps": 0.1},
]


def spec(read: ConfigReader) -> DecoderSpec:
    bias = read("attention_bias", False)
    return llama_like(
        read,
        qkv_bias=bias,
        out_bias=bias,
        mlp=gated(read, bias=read("mlp_bias", False)),
        **multipliers(read),
    )
