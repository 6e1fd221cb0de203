"""SigLIP's text tower: every token sees all, read at the last one."""

from topwork.models.config import ConfigReader
from topwork.models.contrastive import LastToken, TextSpec
from topwork.models.families._clip import block, text_models

CASES = [
    {},
    {"hidden_act": "gelu", "layer_norm_eps": 0.1, "pad_token_id": 0},
    {"num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 3},
    {"projection_size": 20},
]


def tower(read: ConfigReader) -> TextSpec:
    made = block(read, "gelu_pytorch_tanh", 1e-6, False, (768, 12, 3072))
    return TextSpec(
        read("vocab_size", 32000),
        read("max_position_embeddings", 64),
        made,
        read("num_hidden_layers", 12),
        LastToken(made.hidden, read("projection_size", made.hidden)),
    )


MODELS = text_models(tower)
