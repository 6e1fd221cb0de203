"""ALBERT: small embeddings, and blocks that are used again for several layers."""

from dataclasses import replace

from topwork.models.config import ConfigReader
from topwork.models.encoder import BlockNames
from topwork.models.encoder_heads import FamilySpec, HeadSpec, encoder_models
from topwork.models.families._encoders import bert_like

CASES = [
    {"embedding_size": 24},
    {"num_hidden_layers": 2, "num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 16,
     "hidden_act": "relu", "layer_norm_eps": 0.01, "type_vocab_size": 3},
    {"embedding_size": 8, "num_attention_heads": 2, "tie_word_embeddings": False,
     "num_hidden_layers": 3, "num_hidden_groups": 2},
]  # fmt: skip
NAMES = BlockNames(
    "attention.query", "attention.key", "attention.value", "attention.dense",
    "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm",
)  # fmt: skip


def family(read: ConfigReader) -> FamilySpec:
    read.ignore("net_structure_type", "down_scale_factor", "gap_size", "num_memory_blocks")
    act, dropout = read("hidden_act", "gelu_new"), read.rate("classifier_dropout_prob", 0.1)
    width = read("embedding_size", 128)
    sentence = HeadSpec("classifier", "albert.pooler", "tanh", pool="first", dropout=dropout)
    heads = {
        "masked-lm": HeadSpec(
            "predictions.decoder", "predictions.dense", act, "predictions.LayerNorm",
            bias="predictions.bias", width=width,
        ),
        "sequence-classification": sentence,
        "token-classification": HeadSpec("classifier", dropout=dropout),
        "question-answering": HeadSpec("qa_outputs"),
        "multiple-choice": sentence,
    }  # fmt: skip
    rates = read.rate("attention_probs_dropout_prob"), read.rate("hidden_dropout_prob")
    found = bert_like(
        read, "albert", heads, names=NAMES, outer=OUTER, pooler="pooler", dropouts=(*rates, 0.0)
    )
    layers, groups = read.need("num_hidden_layers"), read("num_hidden_groups", 1)
    order = tuple(
        f"encoder.albert_layer_groups.{i * groups // layers}.albert_layers.{j}"
        for i in range(layers)
        for j in range(read("inner_group_num", 1))
    )
    embedding = replace(found.encoder.embedding, size=width, outer=OUTER)
    encoder = replace(found.encoder, order=order, embedding=embedding)
    return replace(found, encoder=encoder, drop=("sop_classifier",))


OUTER = "encoder.embedding_hidden_mapping_in"
MODELS = encoder_models(family)
