"""Llama 1 to 3 and what copies it (SmolLM2, TinyLlama, Yi …)."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import gated, llama_like

CASES = [
    {},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "head_dim": 20},
    {"rms_norm_eps": 0.1, "hidden_act": "gelu_pytorch_tanh"},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 12},
    {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 2.0,
            "high_freq_factor": 5.0, "original_max_position_embeddings": 32,
        },
    },
    {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
            "original_max_position_embeddings": 32, "beta_fast": 8.0,
            "attention_factor": 1.3,
        },
    },
    {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "mscale": 0.7,
            "mscale_all_dim": 0.4, "truncate": False, "original_max_position_embeddings": 32,
        },
    },
    {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1000.0, "factor": 2.0,
                         "partial_rotary_factor": 0.5}},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias = read("attention_bias", False)
    return llama_like(
        read,
        qkv_bias=bias,
        out_bias=bias,
        mlp=gated(read, bias=read("mlp_bias", False)),
        answers="transformer",
    )
