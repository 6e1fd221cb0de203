"""BERT, and MiniLM, BGE, E5 and GTE in its shape."""

from dataclasses import replace

from topwork.models.config import ConfigReader
from topwork.models.encoder_heads import FamilySpec, HeadSpec, encoder_models
from topwork.models.families._encoders import bert_like, plain_heads, pooled_head

CASES = [
    {},
    {"hidden_act": "relu", "layer_norm_eps": 0.1, "type_vocab_size": 3},
    {"num_attention_heads": 2, "hidden_act": "gelu_new", "tie_word_embeddings": False},
]


def family(read: ConfigReader) -> FamilySpec:
    act = read("hidden_act", "gelu")
    read.ignore("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_type",
                "pooler_num_fc_layers", "pooler_size_per_head")  # fmt: skip
    masked = "cls.predictions"
    heads = {
        **plain_heads(read),
        "masked-lm": HeadSpec(
            f"{masked}.decoder", f"{masked}.transform.dense", act,
            f"{masked}.transform.LayerNorm", bias=f"{masked}.bias",
        ),
        "sequence-classification": pooled_head(read, "bert.pooler.dense"),
        "multiple-choice": pooled_head(read, "bert.pooler.dense"),
    }  # fmt: skip
    return replace(bert_like(read, "bert", heads), drop=("cls.seq_relationship",))


MODELS = encoder_models(family)
