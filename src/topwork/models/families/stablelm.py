"""StableLM: LayerNorms with bias, rotary on a quarter of each head, a norm for each head."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import ONE_NORM, PRE_NORMS, DecoderSpec
from topwork.models.families._common import head_size, llama_like, read_rotary
from topwork.nn.layers import QkNorm
from topwork.nn.norms import NormSpec
from topwork.weights import Pack, Table

CASES = [
    {},
    {"use_qkv_bias": True, "qk_layernorm": True, "hidden_size": 48, "num_attention_heads": 4,
     "num_key_value_heads": 2,
     "partial_rotary_factor": 0.5},
    {"use_parallel_residual": True, "tie_word_embeddings": True, "layer_norm_eps": 0.1},
    {"hidden_act": "gelu", "rope_theta": 100.0, "hidden_size": 80},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    eps, parallel = read("layer_norm_eps", 1e-5), read("use_parallel_residual", False)
    per_head = QkNorm(NormSpec("layer", eps), "heads", ("q_layernorm", "k_layernorm"))
    return llama_like(
        read,
        norm=NormSpec("layer-bias", eps),
        rotary=read_rotary(read, head_size(read), share=0.25),
        qkv_bias=read("use_qkv_bias", False),
        qk_norm=per_head if read("qk_layernorm", False) else None,
        layer={
            "norms": ONE_NORM if parallel else PRE_NORMS,
            "parallel": parallel,
            "dropout": (0.0, read.rate("hidden_dropout")),
        },
        table=Table(tuple(Pack((f"{n}.norms.#.weight",), f"{n}.weight") for n in per_head.names)),
    )
