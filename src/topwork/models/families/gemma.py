"""Gemma: norms stored as their distance from one, a scaled embedding, tanh-GELU."""

from dataclasses import replace

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import gated, llama_like, rms

CASES = [
    {"head_dim": 8, "tie_word_embeddings": True},
    {"head_dim": 12, "attention_bias": True, "rms_norm_eps": 0.1},
    {"head_dim": 16, "hidden_act": "silu", "rope_theta": 100.0},
]


def spec(read: ConfigReader) -> DecoderSpec:
    read.only("use_bidirectional_attention", False)
    return text_spec(read)


def text_spec(read: ConfigReader) -> DecoderSpec:
    """Whatever tokens see of each other."""
    read.ignore("hidden_activation")  # of old files; the tanh form is meant whatever it says
    bias, act = read("attention_bias", False), read("hidden_act", "gelu_pytorch_tanh")
    mlp = gated(read, "gelu_pytorch_tanh")
    if act == "gelu":  # the first files say gelu and mean its tanh form
        mlp = replace(mlp, activation="gelu_pytorch_tanh")
    return llama_like(
        read,
        norm=rms(read, "rms-offset"),
        head_dim=256,
        qkv_bias=bias,
        out_bias=bias,
        mlp=mlp,
        tied=True,
        embedding_scale=read.need("hidden_size") ** 0.5,
    )
