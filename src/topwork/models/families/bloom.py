"""BLOOM: ALiBi, a norm behind the embedding, q, k and v side by side for each head."""

from topwork.models.config import ConfigReader
from topwork.models.families._gpt import either, models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names
from topwork.nn.alibi import AlibiSpec

TINY = {"hidden_size": 40, "n_layer": 2, "n_head": 5}
CASES = [
    {},
    {"apply_residual_connection_post_layernorm": True},
    {"layer_norm_epsilon": 0.1, "n_head": 4},
    {"tie_word_embeddings": True, "hidden_size": 48, "n_head": 12},
]

NAMES = Names(
    trunk="transformer", embed="word_embeddings", layers="h", norm="ln_f",
    norm_1="input_layernorm", qkv=("self_attention.query_key_value",), out="self_attention.dense",
    norm_2="post_attention_layernorm", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
)  # fmt: skip


def gpt_spec(read: ConfigReader) -> GptSpec:
    # How Megatron ran; the result is the same.
    read.ignore(
        "bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "offset_alibi", "pretraining_tp",
        "seq_length", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact",
    )  # fmt: skip
    hidden = either(read, "hidden_size", "n_embed")
    heads = either(read, "n_head", "num_attention_heads")
    size = hidden // heads
    rate = read.rate("hidden_dropout")
    order = "pre_norm"
    if read("apply_residual_connection_post_layernorm", False):
        order = "norm_in_stream"
    layer = GptLayerSpec(
        GptAttentionSpec(
            heads, heads, size, size**-0.5, grouped=True, dropout=read.rate("attention_dropout")
        ),
        GptMlpSpec(4 * hidden, "gelu_new"),
        order,
        (rate, rate),
    )
    return GptSpec(
        names=NAMES,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=2048,
        norm_eps=read("layer_norm_epsilon", 1e-5),
        layers=(layer,) * either(read, "n_layer", "num_hidden_layers"),
        tied=read("tie_word_embeddings", True),
        embed_norm=True,
        alibi=AlibiSpec(heads),
    )


MODELS = models(gpt_spec)
