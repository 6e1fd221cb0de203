"""Whisper: a spectrogram of half a minute in, text with time stamps out (arXiv:2212.04356)."""

from __future__ import annotations

from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import Config, ConfigReader
from topwork.models.families._speech import read_augment
from topwork.models.seq2seq import Seq2SeqSpec
from topwork.models.speech_seq2seq import SpectrogramClassifier, SpectrogramStack, SpeechSeq2Seq
from topwork.models.stack import StackNames, StackSpec
from topwork.nn.layers import activation
from topwork.nn.norms import NormSpec
from topwork.nn.places import LearnedPlaces, StoredSines
from topwork.weights import Table

CASES: list[dict[str, Any]] = [
    {},
    {"activation_function": "relu", "encoder_ffn_dim": 40, "num_mel_bins": 16,
     "use_weighted_layer_sum": True, "classifier_proj_size": 20},
    {"encoder_layers": 1, "decoder_layers": 3, "decoder_attention_heads": 6,
     "encoder_attention_heads": 2, "decoder_ffn_dim": 40, "tie_word_embeddings": False},
]  # fmt: skip


def stack_spec(read: ConfigReader, side: str) -> StackSpec:
    """The encoder's or the decoder's stack."""
    hidden, crossed = read("d_model", 384), side == "decoder"
    heads = read(f"{side}_attention_heads", 6)
    if hidden % heads:
        raise ConfigError(f"d_model={hidden} is no multiple of {side}_attention_heads={heads}")
    read.only(f"{side}_layerdrop", 0.0)
    read.only("scale_embedding", False)
    context = read("max_target_positions", 448) if crossed else read("max_source_positions", 1500)

    def places() -> Any:
        if crossed:
            return LearnedPlaces(context, hidden, 0)
        return StoredSines(context, hidden, fairseq=True)

    return StackSpec(
        read("vocab_size", 51865) if crossed else 0, hidden, heads, hidden // heads,
        read(f"{side}_ffn_dim", 1536), read(f"{side}_layers", 4),
        activation(read("activation_function", "gelu")), NormSpec("layer-bias", 1e-5),
        (hidden // heads) ** -0.5, True, True, StackNames(final_norm="layer_norm"),
        crossed=crossed, context=context, places=places, key_bias=False,
        dropout=read.rate("dropout"), inner_dropout=read.rate("activation_dropout"),
        attention_dropout=read.rate("attention_dropout"),
    )  # fmt: skip


def unused(read: ConfigReader) -> None:
    """What concerns other heads, beginning anew, or generation, which reads it for itself."""
    read.ignore(
        "init_std", "num_hidden_layers", "forced_decoder_ids", "median_filter_width",
        "use_weighted_layer_sum", "classifier_proj_size", "tie_word_embeddings",
    )  # fmt: skip


def transcriber(config: Config, read: ConfigReader) -> SpeechSeq2Seq:
    unused(read)
    spec = Seq2SeqSpec(
        "model",
        stack_spec(read, "encoder"),
        stack_spec(read, "decoder"),
        shared=False,
        tied=bool(read("tie_word_embeddings", True)),
        bias=False,
        table=Table(prefix="model."),
        head_name="proj_out",
    )
    return SpeechSeq2Seq(config, spec, read("num_mel_bins", 80), read_augment(read, False))


def classifier(config: Config, read: ConfigReader) -> SpectrogramClassifier:
    unused(read)
    read.ignore("vocab_size", "max_target_positions", "decoder_layers", "decoder_layerdrop",
                "decoder_attention_heads", "decoder_ffn_dim")  # fmt: skip
    augment = read_augment(read, False)
    stack = SpectrogramStack(stack_spec(read, "encoder"), read("num_mel_bins", 80), augment)
    weighted = bool(read("use_weighted_layer_sum", False))
    return SpectrogramClassifier(config, stack, read("classifier_proj_size", 256), weighted)


MODELS = {"speech-seq2seq": transcriber, "audio-classification": classifier}
