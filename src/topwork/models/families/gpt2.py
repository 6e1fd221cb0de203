"""GPT-2: learned positions, weights that lie as [in, out]."""

from topwork.models.config import ConfigReader
from topwork.models.families._gpt import models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names
from topwork.nn.conv1d import Conv1D

TINY = {"n_embd": 40, "n_inner": 56, "n_layer": 2, "n_head": 5, "n_positions": 64}
CASES = [
    {},
    {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    {"scale_attn_weights": False, "layer_norm_epsilon": 0.1, "reorder_and_upcast_attn": True},
    {"tie_word_embeddings": True, "n_inner": None, "n_head": 4},
]

NAMES = Names(
    trunk="transformer", embed="wte", layers="h", norm="ln_f", norm_1="ln_1",
    qkv=("attn.c_attn",), out="attn.c_proj", norm_2="ln_2", up="mlp.c_fc", down="mlp.c_proj",
)  # fmt: skip


def gpt_spec(read: ConfigReader) -> GptSpec:
    hidden, heads = read.need("n_embd"), read.need("n_head")
    size = hidden // heads
    scale = size**-0.5 if read("scale_attn_weights", True) else 1.0
    deeper = read("scale_attn_by_inverse_layer_idx", False)
    mlp = GptMlpSpec(read("n_inner", 4 * hidden), read("activation_function", "gelu_new"))
    drop, rate = read.rate("attn_pdrop", 0.1), read.rate("resid_pdrop", 0.1)
    return GptSpec(
        names=NAMES,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=read("n_positions", 1024),
        norm_eps=read("layer_norm_epsilon", 1e-5),
        layers=tuple(
            GptLayerSpec(
                GptAttentionSpec(
                    heads, heads, size, scale / (i + 1) if deeper else scale, dropout=drop
                ),
                mlp,
                dropout=(rate, rate),
            )
            for i in range(read.need("n_layer"))
        ),
        tied=read("tie_word_embeddings", True),
        linear=Conv1D,
        learned=0,
        dropout=read.rate("embd_pdrop", 0.1),
    )


MODELS = models(gpt_spec)
