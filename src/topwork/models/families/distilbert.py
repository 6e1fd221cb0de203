"""DistilBERT: half of BERT's layers, no token types, no pooler."""

from topwork.models.config import ConfigReader
from topwork.models.encoder import (
    BlockNames,
    EmbeddingSpec,
    EncoderSpec,
    PostNormBlock,
    PostNormSpec,
)
from topwork.models.encoder_heads import FamilySpec, HeadSpec, encoder_models
from topwork.models.families._encoders import head_size
from topwork.nn.layers import activation

CASES = [
    {},
    {"activation": "relu", "n_heads": 2, "sinusoidal_pos_embds": True},
    {"tie_word_embeddings": False, "hidden_dim": 20, "activation": "gelu_new"},
]
NAMES = BlockNames(
    "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
    "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip


def family(read: ConfigReader) -> FamilySpec:
    read.ignore("sinusoidal_pos_embds", "tie_weights_", "output_past", "gradient_checkpointing")
    hidden, count = read("dim", 768), read("n_heads", 12)
    act, dropout = activation(read("activation", "gelu")), read.rate("dropout", 0.1)
    block = PostNormSpec(
        hidden, count, head_size(hidden, count), read("hidden_dim", 4 * 768), act, 1e-12,
        (read.rate("attention_dropout", 0.1), 0.0, dropout), NAMES,
    )  # fmt: skip
    spec = EncoderSpec(
        hidden,
        1e-12,
        dropout,
        EmbeddingSpec(read.need("vocab_size"), hidden, read("max_position_embeddings", 512)),
        tuple(f"transformer.layer.{i}" for i in range(read("n_layers", 6))),
        lambda _: PostNormBlock(block),
    )
    sentence = HeadSpec(
        "classifier", "pre_classifier", "relu", pool="first",
        dropout=read.rate("seq_classif_dropout", 0.2),
    )  # fmt: skip
    heads = {
        "masked-lm": HeadSpec("vocab_projector", "vocab_transform", act, "vocab_layer_norm"),
        "sequence-classification": sentence,
        "token-classification": HeadSpec("classifier", dropout=dropout),
        "question-answering": HeadSpec("qa_outputs", dropout=read.rate("qa_dropout", 0.1)),
        "multiple-choice": sentence,
    }
    return FamilySpec("distilbert", spec, heads, bool(read("tie_word_embeddings", True)))


MODELS = encoder_models(family)
