"""ELECTRA: BERT whose embeddings may be narrower than its layers."""

from dataclasses import replace

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.encoder_heads import FamilySpec, HeadSpec, encoder_models
from topwork.models.families._encoders import bert_like, classifier_dropout, plain_heads

CASES = [
    {"embedding_size": 16},
    {"embedding_size": 40, "hidden_act": "relu", "layer_norm_eps": 0.01},
    {"embedding_size": 24, "num_attention_heads": 2, "tie_word_embeddings": False,
     "type_vocab_size": 3, "summary_activation": "tanh"},
]  # fmt: skip


def family(read: ConfigReader) -> FamilySpec:
    usual = {"summary_type": "first", "summary_use_proj": True}
    for key, value in usual.items():
        if read(key, value) != value:
            raise ConfigError(f"{key}={read(key)!r}: only {value!r} is supported")
    heads = {
        **plain_heads(read),
        "masked-lm": HeadSpec(
            "generator_lm_head", "generator_predictions.dense",
            norm="generator_predictions.LayerNorm",
            width=read("embedding_size", read.need("hidden_size")),
        ),
        "sequence-classification": HeadSpec(
            "classifier.out_proj", "classifier.dense", pool="first",
            dropout=classifier_dropout(read), drop_first=classifier_dropout(read),
        ),
        "multiple-choice": HeadSpec(
            "classifier", "sequence_summary.summary", read("summary_activation", "gelu"),
            pool="first", dropout=read.rate("summary_last_dropout", 0.1),
        ),
    }  # fmt: skip
    found = bert_like(read, "electra", heads, outer="embeddings_project", pooler=None)
    return replace(found, drop=("discriminator_predictions",))


MODELS = encoder_models(family)
