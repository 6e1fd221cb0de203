"""What BART, mBART, Marian, Pegasus and M2M-100 read alike."""

from __future__ import annotations

import math
from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.seq2seq import Seq2SeqSpec
from topwork.models.stack import StackNames, StackSpec
from topwork.nn.layers import activation
from topwork.nn.norms import NormSpec
from topwork.nn.places import LearnedPlaces, Sines, StoredSines
from topwork.weights import Table

# Of the first files: what they say must be what the family does.
EMPTY = ("num_hidden_layers", "output_past", "gradient_checkpointing", "add_bias_logits",
         "force_bos_token_to_be_generated", "extra_pos_embeddings", "save_step", "classif_dropout",
         "classifier_dropout", "init_std", "_num_labels")  # fmt: skip


def refuse_contradictions(read: ConfigReader, facts: dict[str, bool]) -> None:
    for key, value in facts.items():
        if bool(read(key, value)) != value:
            raise ConfigError(f"{key}={read(key)!r}: this family is defined for {value}")
    read.ignore(*EMPTY)


def dropouts(read: ConfigReader, side: str, attention: float, layer: float) -> dict[str, float]:
    """What is dropped in one stack; the last two are defaults."""
    return {
        "dropout": read.rate("dropout", 0.1),
        "attention_dropout": read.rate("attention_dropout", attention),
        "inner_dropout": read.rate("activation_dropout"),
        "layer_drop": read.rate(f"{side}_layerdrop", layer),
    }


def bart_like(
    read: ConfigReader,
    *,
    norm_first: bool,
    embedding_norm: bool,
    places: str,
    scaled: bool = False,
    bias: bool = True,
    wraps: bool = False,
    act: str = "gelu",
    rates: tuple[float, float] = (0.0, 0.0),
    drop: tuple[str, ...] = (),
) -> Seq2SeqSpec:
    """Both stacks from the keys that they share. `places`: learned, sines, stored or fairseq;
    `rates`: the defaults of attention_dropout and of encoder_ and decoder_layerdrop."""
    refuse_contradictions(
        read,
        {
            "normalize_before": norm_first,
            "add_final_layer_norm": norm_first,
            "normalize_embedding": embedding_norm,
            "static_position_embeddings": places in ("sines", "stored"),
        },
    )
    hidden, context = read("d_model", 1024), read("max_position_embeddings", 1024)
    vocab = read.need("vocab_size")
    make = {
        "learned": lambda: LearnedPlaces(context, hidden, 2),
        "sines": lambda: Sines(hidden),
        "stored": lambda: StoredSines(context, hidden),
        "fairseq": lambda: Sines(hidden, fairseq=True, offset=read("pad_token_id", 1) + 1),
    }[places]
    names = StackNames(
        embedding_norm="layernorm_embedding" if embedding_norm else None,
        final_norm="layer_norm" if norm_first else None,
    )

    def stack(side: str, crossed: bool, words: int) -> StackSpec:
        heads = read(f"{side}_attention_heads", 16)
        if hidden % heads:
            raise ConfigError(f"d_model={hidden} is no multiple of {side}_attention_heads={heads}")
        options: dict[str, Any] = dropouts(read, side, *rates)
        return StackSpec(
            words, hidden, heads, hidden // heads, read(f"{side}_ffn_dim", 4096),
            read(f"{side}_layers", 12), activation(read("activation_function", act)),
            NormSpec("layer-bias", 1e-5), (hidden // heads) ** -0.5, True, norm_first, names,
            embedding_scale=math.sqrt(hidden) if read("scale_embedding", scaled) else 1.0,
            crossed=crossed, context=context, places=make, **options,
        )  # fmt: skip

    return Seq2SeqSpec(
        "model",
        stack("encoder", False, vocab),
        stack("decoder", True, read("decoder_vocab_size", vocab)),
        shared=read("share_encoder_decoder_embeddings", True),
        tied=bool(read("tie_word_embeddings", True)),
        bias=bias,
        wraps=wraps,
        table=Table(drop=drop, prefix="model.", fresh=(r"^final_logits_bias$",) if bias else ()),
    )


SMALL = {"encoder_ffn_dim": 56, "encoder_attention_heads": 2}
BART_CASES: list[dict[str, Any]] = [
    {},
    {"scale_embedding": True, "activation_function": "relu", **SMALL},
    {"encoder_layers": 1, "decoder_layers": 3, "decoder_attention_heads": 6, "decoder_ffn_dim": 40},
]
