"""Gemma 3 (text): Gemma 2 with norms on queries and keys, and a rotary base by kind of layer."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import SANDWICH_NORMS, DecoderSpec, HeadSpec
from topwork.models.families._common import (
    every_nth_full,
    head_size,
    layer_types,
    llama_like,
    read_rotaries,
    rms,
    windowed,
)
from topwork.nn.layers import MlpSpec, QkNorm
from topwork.weights import Rename, Table

BOTH = ["sliding_attention", "full_attention"]
CASES = [
    {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 24, "layer_types": BOTH},
    {"head_dim": 8, "final_logit_softcapping": 0.5, "num_attention_heads": 4,
     "num_key_value_heads": 2, "layer_types": BOTH},
    {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "layer_types": BOTH,
     "hidden_activation": "silu", "rms_norm_eps": 0.1},
    {"head_dim": 8, "layer_types": BOTH, "sliding_window": 3, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    {"head_dim": 8, "num_hidden_layers": 4, "sliding_window_pattern": 3, "sliding_window": 3},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    read.only("use_bidirectional_attention", False)
    read.only("attn_logit_softcapping")  # the peer names it and does not act on it
    read.ignore("hidden_act", "cache_implementation")  # hidden_activation is the one that counts
    bias, norm = read("attention_bias", False), rms(read, "rms-offset")
    every = read("sliding_window_pattern", read("_sliding_window_pattern", 6))
    kinds = layer_types(read, every_nth_full(read, every))
    rotaries = read_rotaries(read, head_size(read, 256), theta=1e6, local_theta=1e4)
    act = read("hidden_activation", "gelu_pytorch_tanh")
    return llama_like(
        read,
        norm=norm,
        head_dim=256,
        rotary=[rotaries[kind] for kind in kinds],
        windows=windowed(kinds, read("sliding_window", 4096)),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QkNorm(norm),
        mlp=MlpSpec(read.need("intermediate_size"), act),
        attention={"scale": read("query_pre_attn_scalar", 256) ** -0.5},
        layer={"norms": SANDWICH_NORMS},
        tied=True,
        embedding_scale=read.need("hidden_size") ** 0.5,
        head=HeadSpec(softcap=read("final_logit_softcapping")),
        table=Table(old=(Rename("language_model", ""),), drop=(r"^(vision_tower|multi_modal)",)),
    )
