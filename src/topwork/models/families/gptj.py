"""GPT-J: attention and MLP side by side behind one norm; the first dimensions of a head turn."""

from topwork.models.config import ConfigReader
from topwork.models.families._gpt import models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names
from topwork.nn.rotary import RotarySpec

TINY = {
    "n_embd": 40, "n_inner": 56, "n_layer": 2, "n_head": 5, "n_positions": 64, "rotary_dim": 4,
}  # fmt: skip
CASES = [
    {},
    {"rotary_dim": 8, "activation_function": "relu"},
    {"rotary_dim": 2, "n_head": 4, "layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": True, "n_inner": None},
]

NAMES = Names(
    trunk="transformer", embed="wte", layers="h", norm="ln_f", norm_1="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), out="attn.out_proj", norm_2="ln_1",
    up="mlp.fc_in", down="mlp.fc_out",
)  # fmt: skip


def gpt_spec(read: ConfigReader) -> GptSpec:
    read.ignore("rotary", "scale_attn_weights")
    hidden, heads = read.need("n_embd"), read.need("n_head")
    size, context = hidden // heads, read("n_positions", 2048)
    rate = read.rate("resid_pdrop")
    rotary = RotarySpec(read("rotary_dim", 64), 10000.0, context, interleaved=True)
    layer = GptLayerSpec(
        GptAttentionSpec(
            heads, heads, size, size**-0.5, qkv_bias=False, out_bias=False, rotary=rotary,
            dropout=read.rate("attn_pdrop"),
        ),
        GptMlpSpec(read("n_inner", 4 * hidden), read("activation_function", "gelu_new")),
        "parallel_one_norm",
        (rate, rate),
    )  # fmt: skip
    return GptSpec(
        names=NAMES,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=context,
        norm_eps=read("layer_norm_epsilon", 1e-5),
        layers=(layer,) * read.need("n_layer"),
        tied=read("tie_word_embeddings", False),
        head_bias=True,
        dropout=read.rate("embd_pdrop"),
    )


MODELS = models(gpt_spec, without=("token-classification",))
