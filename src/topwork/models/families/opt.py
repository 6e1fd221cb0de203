"""OPT: learned positions from the third row on; the 350M model norms after its sublayers."""

from topwork.models.config import ConfigReader
from topwork.models.families._gpt import models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names

TINY = {
    "hidden_size": 40, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 5,
    "max_position_embeddings": 64, "word_embed_proj_dim": 40,
}  # fmt: skip
CASES = [
    {},
    {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    {"enable_bias": False, "activation_function": "gelu"},
    {"layer_norm_elementwise_affine": False},
    {"_remove_final_layer_norm": True},
    {"tie_word_embeddings": True, "word_embed_proj_dim": 24},
]

NAMES = Names(
    trunk="model", embed="decoder.embed_tokens", positions="decoder.embed_positions",
    project_in="decoder.project_in", project_out="decoder.project_out", layers="decoder.layers",
    norm="decoder.final_layer_norm", norm_1="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), out="self_attn.out_proj",
    norm_2="final_layer_norm", up="fc1", down="fc2",
)  # fmt: skip


def gpt_spec(read: ConfigReader) -> GptSpec:
    read.ignore("activation_dropout", "init_std")  # the peer's blocks have none within the MLP
    hidden, heads = read.need("hidden_size"), read.need("num_attention_heads")
    bias, before = read("enable_bias", True), read("do_layer_norm_before", True)
    removed = read("_remove_final_layer_norm", False)  # fine-tuned before transformers 4.20.1
    rate = read.rate("dropout", 0.1)
    layer = GptLayerSpec(
        GptAttentionSpec(
            heads, heads, hidden // heads, (hidden // heads) ** -0.5, qkv_bias=bias, out_bias=bias,
            dropout=read.rate("attention_dropout"),
        ),
        GptMlpSpec(read.need("ffn_dim"), read("activation_function", "relu"), bias),
        "pre_norm" if before else "post_norm",
        (rate, rate),
    )  # fmt: skip
    return GptSpec(
        names=NAMES,
        vocab=read.need("vocab_size"),
        hidden=read("word_embed_proj_dim", hidden),
        inner=hidden,
        context=read("max_position_embeddings", 2048),
        norm_eps=1e-5,
        layers=(layer,) * read.need("num_hidden_layers"),
        tied=read("tie_word_embeddings", True),
        norm_affine=read("layer_norm_elementwise_affine", True),
        final_norm=before and not removed,
        learned=2,
        layer_drop=read.rate("layerdrop"),
    )


MODELS = models(gpt_spec, without=("token-classification",))
