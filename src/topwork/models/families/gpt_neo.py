"""GPT-Neo: layers that see everything alternate with layers that see a window; scores unscaled."""

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.families._gpt import models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names

TINY = {
    "hidden_size": 40, "intermediate_size": 56, "num_layers": 2, "num_heads": 5,
    "max_position_embeddings": 64, "attention_types": [[["global"], 2]],
}  # fmt: skip
CASES = [
    {},
    {"attention_types": [[["global", "local"], 1]], "window_size": 3},
    {"attention_types": [[["local"], 2]], "window_size": 2, "layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": True, "intermediate_size": None, "activation_function": "relu"},
]

NAMES = Names(
    trunk="transformer", embed="wte", layers="h", norm="ln_f", norm_1="ln_1",
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    out="attn.attention.out_proj", norm_2="ln_2", up="mlp.c_fc", down="mlp.c_proj",
)  # fmt: skip


def kinds(read: ConfigReader) -> list[str]:
    """ "global" or "local" for each layer: `attention_types` repeats patterns, as [[[…], n], …]."""
    types = read("attention_types", [[["global", "local"], 12]])
    found = [kind for pattern, count in types for _ in range(count) for kind in pattern]
    wanted = read("attention_layers", found) if not read.has("attention_types") else found
    if len(wanted) != read.need("num_layers") or not set(wanted) <= {"global", "local"}:
        raise ConfigError(
            f"attention_types={types!r} does not describe {read.need('num_layers')} layers of "
            "kind 'global' or 'local'"
        )
    return wanted


def gpt_spec(read: ConfigReader) -> GptSpec:
    read.ignore("attention_layers")
    rate, drop = read.rate("resid_dropout"), read.rate("attention_dropout")
    hidden, heads = read.need("hidden_size"), read.need("num_heads")
    window = read("window_size", 256)
    mlp = GptMlpSpec(read("intermediate_size", 4 * hidden), read("activation_function", "gelu_new"))
    return GptSpec(
        names=NAMES,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=read("max_position_embeddings", 2048),
        norm_eps=read("layer_norm_epsilon", 1e-5),
        layers=tuple(
            GptLayerSpec(
                GptAttentionSpec(
                    heads, heads, hidden // heads, 1.0, qkv_bias=False,
                    window=window if kind == "local" else None, dropout=drop,
                ),
                mlp,
                dropout=(rate, rate),
            )
            for kind in kinds(read)
        ),
        tied=read("tie_word_embeddings", True),
        learned=0,
        dropout=read.rate("embed_dropout"),
    )  # fmt: skip


MODELS = models(gpt_spec)
