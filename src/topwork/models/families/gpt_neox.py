"""GPT-NeoX, Pythia: attention and MLP side by side behind a norm each; partial rotary."""

from topwork.models.config import ConfigReader
from topwork.models.families._common import read_rotary
from topwork.models.families._gpt import models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names
from topwork.weights import Rename

TINY = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5,
    "max_position_embeddings": 64,
}  # fmt: skip
CASES = [
    {},
    {"use_parallel_residual": False, "hidden_act": "gelu_new"},
    {"attention_bias": False, "layer_norm_eps": 0.1},
    {"rotary_pct": 1.0, "rotary_emb_base": 77.0},
    {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"tie_word_embeddings": True, "num_attention_heads": 4},
]

NAMES = Names(
    trunk="gpt_neox", embed="embed_in", layers="layers", norm="final_layer_norm",
    norm_1="input_layernorm", qkv=("attention.query_key_value",), out="attention.dense",
    norm_2="post_attention_layernorm", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
)  # fmt: skip


def gpt_spec(read: ConfigReader) -> GptSpec:
    read.ignore(
        "attention_dropout_prob", "attention_probs_dropout_prob", "bias_dropout_fusion",
        "hidden_dropout_prob",
    )  # fmt: skip
    hidden, heads = read.need("hidden_size"), read.need("num_attention_heads")
    size, bias = hidden // heads, read("attention_bias", True)
    rotary = read_rotary(
        read, size, share=read("rotary_pct", 0.25), theta=read("rotary_emb_base", 10000.0)
    )
    rate = read.rate("hidden_dropout")
    layer = GptLayerSpec(
        GptAttentionSpec(
            heads, heads, size, size**-0.5, grouped=True, qkv_bias=bias, out_bias=bias,
            rotary=rotary, dropout=read.rate("attention_dropout"),
        ),
        GptMlpSpec(read.need("intermediate_size"), read("hidden_act", "gelu")),
        "parallel" if read("use_parallel_residual", True) else "pre_norm",
        (rate, rate),
    )  # fmt: skip
    return GptSpec(
        names=NAMES,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=read("max_position_embeddings", 2048),
        norm_eps=read("layer_norm_eps", 1e-5),
        layers=(layer,) * read.need("num_hidden_layers"),
        tied=read("tie_word_embeddings", False),
        dropout=rate,
        renames=(Rename("^embed_out", "^lm_head"),),
    )


MODELS = models(gpt_spec)
