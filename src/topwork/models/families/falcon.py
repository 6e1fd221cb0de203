"""Falcon in its three layouts: 40B (groups of heads), 7B (one key/value head), RW (ALiBi)."""

from dataclasses import replace

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.families._common import read_rotary
from topwork.models.families._gpt import either, models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names
from topwork.nn.alibi import AlibiSpec

TINY = {
    "hidden_size": 40, "ffn_hidden_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5,
    "max_position_embeddings": 64,
}  # fmt: skip
CASES = [
    {},
    {"multi_query": False, "bias": True, "activation": "relu"},
    {"parallel_attn": False, "layer_norm_epsilon": 0.1},
    {"new_decoder_architecture": True, "num_attention_heads": 4, "num_kv_heads": 2},
    {
        "new_decoder_architecture": True, "num_attention_heads": 4, "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1, "bias": True,
    },
    {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    {"alibi": True, "hidden_size": 96, "num_attention_heads": 24},
    {"rope_theta": 77.0, "tie_word_embeddings": True, "ffn_hidden_size": None},
    {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
]  # fmt: skip

NAMES = Names(
    trunk="transformer", embed="word_embeddings", layers="h", norm="ln_f",
    norm_1="input_layernorm", qkv=("self_attention.query_key_value",), out="self_attention.dense",
    norm_2="post_attention_layernorm", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
)  # fmt: skip


def order(read: ConfigReader) -> tuple[str, Names]:
    """How a block runs, and what its norms are called then."""
    groups = read("new_decoder_architecture", False)
    norms = read("num_ln_in_parallel_attn", 2 if groups else 1)
    if groups and norms == 2:
        return "parallel_sum", replace(NAMES, norm_1="ln_attn", norm_2="ln_mlp")
    if norms == 2:
        raise ConfigError(
            "num_ln_in_parallel_attn=2 has a meaning only with new_decoder_architecture=true"
        )
    if groups or read("parallel_attn", True):
        return "parallel_sum_one_norm", replace(NAMES, norm_2=NAMES.norm_1)
    return "pre_norm", NAMES


def gpt_spec(read: ConfigReader) -> GptSpec:
    read.ignore("parallel_attn", "multi_query", "head_dim")
    if read("apply_residual_connection_post_layernorm", False):
        raise ConfigError("apply_residual_connection_post_layernorm=true is not part of Falcon")
    hidden = either(read, "hidden_size", "n_embed")
    heads = either(read, "num_attention_heads", "n_head")
    size, bias = hidden // heads, read("bias", False)
    kv_heads = heads
    if read("new_decoder_architecture", False):
        kv_heads = read("num_kv_heads", heads)
    elif read("multi_query", True):
        kv_heads = 1
    read.ignore("num_kv_heads", "n_head_kv")
    # Of the probabilities with ALiBi alone, as in the peer; of what attention adds, always.
    drop = read.rate("attention_dropout")
    alibi, rotary = read("alibi", False), read_rotary(read, size)
    how, names = order(read)
    layer = GptLayerSpec(
        GptAttentionSpec(
            heads, kv_heads, size, size**-0.5, grouped=True, qkv_bias=bias, out_bias=bias,
            rotary=None if alibi else rotary, dropout=drop if alibi else 0.0,
        ),
        GptMlpSpec(read("ffn_hidden_size", 4 * hidden), read("activation", "gelu"), bias),
        how,
        (drop, read.rate("hidden_dropout")),
    )  # fmt: skip
    return GptSpec(
        names=names,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=read("max_position_embeddings", 2048),
        norm_eps=read("layer_norm_epsilon", 1e-5),
        layers=(layer,) * either(read, "num_hidden_layers", "n_layer"),
        tied=read("tie_word_embeddings", True),
        alibi=AlibiSpec(heads, factor=size**-0.5, rounded=True) if alibi else None,
    )


MODELS = models(gpt_spec)
