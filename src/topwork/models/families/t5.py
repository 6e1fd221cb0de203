"""T5 and Flan-T5: a bias by distance, no scaling of scores (arXiv:1910.10683)."""

from __future__ import annotations

from dataclasses import replace

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.seq2seq import Seq2SeqModel, Seq2SeqSpec
from topwork.models.stack import StackNames, StackSpec
from topwork.nn.layers import activation
from topwork.nn.norms import NormSpec
from topwork.weights import Table

CASES = [
    {},
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 6},
    {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
     "num_decoder_layers": 1, "layer_norm_epsilon": 0.01, "feed_forward_proj": "gated-silu"},
]  # fmt: skip
ENCODER = StackNames(
    blocks="block",
    attention="layer.0.SelfAttention",
    attention_norm="layer.0.layer_norm",
    projections=("q", "k", "v", "o"),
    up="layer.1.DenseReluDense.wi",
    down="layer.1.DenseReluDense.wo",
    norm="layer.1.layer_norm",
    final_norm="final_layer_norm",
)
GATED = {
    "up": "layer.1.DenseReluDense.wi_1",
    "gate": "layer.1.DenseReluDense.wi_0",
}


def decoder_names(names: StackNames) -> StackNames:
    """The decoder's: cross-attention is layer 1, and what comes after it is layer 2."""
    later = {
        key: value.replace("layer.1", "layer.2")
        for key in ("up", "gate", "down", "norm")
        if (value := getattr(names, key)) is not None
    }
    cross = {"cross": "layer.1.EncDecAttention", "cross_norm": "layer.1.layer_norm"}
    return replace(names, **later, **cross)


def t5_like(read: ConfigReader, scaled: bool, feed: str = "relu") -> Seq2SeqSpec:
    """`scaled`: the decoder's states are multiplied by d_model^-½ before the head."""
    read.ignore("dense_act_fn", "is_gated_act", "initializer_factor", "classifier_dropout",
                "n_positions", "output_past", "gradient_checkpointing")  # fmt: skip
    kind = read("feed_forward_proj", feed).split("-")
    if len(kind) > 2 or (len(kind) == 2 and kind[0] != "gated"):
        raise ConfigError(f"feed_forward_proj={read('feed_forward_proj')!r}: 'ACT' or 'gated-ACT'")
    act = "gelu_new" if kind == ["gated", "gelu"] else activation(kind[-1])
    names = replace(ENCODER, **GATED) if len(kind) == 2 else ENCODER
    hidden, dropout = read("d_model", 512), read.rate("dropout_rate", 0.1)
    count = read("num_layers", 6)
    encoder = StackSpec(
        read.need("vocab_size"), hidden, read("num_heads", 8), read("d_kv", 64),
        read("d_ff", 2048), count, act, NormSpec("rms", read("layer_norm_epsilon", 1e-6)), 1.0,
        False, True, names,
        relative=(
            read("relative_attention_num_buckets", 32),
            read("relative_attention_max_distance", 128),
        ),
        dropout=dropout, inner_dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    decoder = replace(
        encoder,
        count=read("num_decoder_layers", count),
        names=decoder_names(names),
        crossed=True,
    )
    # A file may hold a head of its own; then it is not tied, whatever the configuration says.
    drop = (r"EncDecAttention\.relative_attention_bias\.weight$",)
    return Seq2SeqSpec(
        "", encoder, decoder, output_scale=hidden**-0.5 if scaled else 1.0, bias=False,
        table=Table(drop=drop),
    )  # fmt: skip


def spec_of(read: ConfigReader) -> Seq2SeqSpec:
    tied = read("tie_word_embeddings") is not False
    return t5_like(read, bool(read("scale_decoder_outputs", tied)))


MODELS = {"seq2seq-lm": lambda config, read: Seq2SeqModel(config, spec_of(read))}
