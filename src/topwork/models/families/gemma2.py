"""Gemma 2: norms on both sides of each branch, soft caps, every other layer in a window."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import SANDWICH_NORMS, DecoderSpec, HeadSpec
from topwork.models.families._common import every_nth_full, layer_types, llama_like, rms, windowed
from topwork.nn.layers import MlpSpec

CASES = [
    {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 24},
    {"head_dim": 8, "attn_logit_softcapping": 0.7, "final_logit_softcapping": None,
     "query_pre_attn_scalar": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": 0.5,
     "tie_word_embeddings": True, "attention_bias": True},
    {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3,
     "hidden_activation": "gelu", "rms_norm_eps": 0.1, "rope_theta": 100.0},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    read.only("use_bidirectional_attention", False)
    return text_spec(read)


def text_spec(read: ConfigReader) -> DecoderSpec:
    """Whatever tokens see of each other."""
    read.ignore("hidden_act", "cache_implementation")  # hidden_activation is the one that counts
    bias, count = read("attention_bias", False), read.need("num_hidden_layers")
    kinds = layer_types(read, every_nth_full(read, 2))
    act = read("hidden_activation", "gelu_pytorch_tanh")
    return llama_like(
        read,
        norm=rms(read, "rms-offset"),
        head_dim=256,
        windows=windowed(kinds, read("sliding_window", 4096)),
        qkv_bias=bias,
        out_bias=bias,
        mlp=[MlpSpec(read.need("intermediate_size"), act)] * count,
        attention={
            "scale": read("query_pre_attn_scalar", 256) ** -0.5,
            "softcap": read.get("attn_logit_softcapping", 50.0),
        },
        layer={"norms": SANDWICH_NORMS},
        tied=True,
        embedding_scale=read.need("hidden_size") ** 0.5,
        head=HeadSpec(softcap=read.get("final_logit_softcapping", 30.0)),
    )
