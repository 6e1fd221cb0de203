"""MPT: ALiBi and no biases; attention's options stand in `attn_config`."""

from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import Config, ConfigReader
from topwork.models.families._gpt import models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec, Names
from topwork.nn.alibi import AlibiSpec

TINY = {"d_model": 40, "n_layers": 2, "n_heads": 5, "max_seq_len": 64}
CASES = [
    {},
    {"attn_config": {"clip_qkv": 0.7}},
    {"attn_config": {"softmax_scale": 0.11}, "n_heads": 4},
    {"tie_word_embeddings": True, "layer_norm_epsilon": 0.1},
]

NAMES = Names(
    trunk="transformer", embed="wte", layers="blocks", norm="norm_f", norm_1="norm_1",
    qkv=("attn.Wqkv",), out="attn.out_proj", norm_2="norm_2", up="ffn.up_proj",
    down="ffn.down_proj",
)  # fmt: skip

# Options of the original that transformers leaves out: their only value that it computes.
ONLY = {"learned_pos_emb": (True, False), "embedding_fraction": (1, 1.0)}
ONLY_IN_ATTENTION = {
    "attn_type": ("multihead_attention",), "alibi": (True,), "prefix_lm": (False,),
    "attn_uses_sequence_id": (False,),
}  # fmt: skip


def only(read: ConfigReader, allowed: dict[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        if read(key, values[0]) not in values:
            raise ConfigError(f"MPT with {key}={read(key)!r} is not supported; only {values[0]!r}")


def gpt_spec(read: ConfigReader) -> GptSpec:
    read.ignore("resid_pdrop", "emb_pdrop", "init_device", "init_config", "verbose",
                "tokenizer_name", "param_init_fn")  # fmt: skip
    only(read, ONLY)
    if "layernorm" not in read("norm_type", "low_precision_layernorm"):
        raise ConfigError(f"MPT with norm_type={read('norm_type')!r} is not supported")
    hidden, heads = read.need("d_model"), read.need("n_heads")
    size = hidden // heads
    bias = not read("no_bias", True)
    inner = ConfigReader(Config(**read("attn_config", {})))
    drop = inner.rate("attn_pdrop")  # of what both branches add, too
    inner.ignore("attn_impl", "output_hidden_states", "return_dict")
    only(inner, ONLY_IN_ATTENTION)
    attention = GptAttentionSpec(
        heads,
        heads,
        size,
        inner("softmax_scale", size**-0.5),
        qkv_bias=bias,
        out_bias=bias,
        clip=inner("clip_qkv"),
        norm_qk=inner("qk_ln", False),
        dropout=drop,
    )
    max_bias = inner("alibi_bias_max", 8)
    inner.finish()
    layer = GptLayerSpec(
        attention,
        GptMlpSpec(int(read("expansion_ratio", 4) * hidden), "gelu", bias),
        dropout=(drop, drop),
    )
    scale = read("logit_scale", 1.0)
    return GptSpec(
        names=NAMES,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=read("max_seq_len", 2048),
        norm_eps=read("layer_norm_epsilon", 1e-5),
        layers=(layer,) * read.need("n_layers"),
        tied=read("tie_word_embeddings", True),
        norm_bias=bias,
        alibi=AlibiSpec(heads, max_bias),
        logit_scale=hidden**-0.5 if scale == "inv_sqrt_d_model" else float(scale),
    )


MODELS = models(gpt_spec)
