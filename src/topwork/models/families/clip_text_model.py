"""CLIP's text tower: causal, read at the end token."""

from topwork.models.config import ConfigReader
from topwork.models.contrastive import EndToken, TextSpec
from topwork.models.families._clip import block, text_models

CASES = [
    {"eos_token_id": 60},
    {"eos_token_id": 2, "hidden_act": "gelu", "layer_norm_eps": 0.1, "pad_token_id": 0},
    {"eos_token_id": 58, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 3},
]


def tower(read: ConfigReader) -> TextSpec:
    read.ignore("projection_dim")
    made = block(read, "quick_gelu", 1e-5, True, (512, 8, 2048))
    end = read("eos_token_id", 49407)
    return TextSpec(
        read("vocab_size", 49408),
        read("max_position_embeddings", 77),
        made,
        read("num_hidden_layers", 12),
        EndToken(None if end == 2 else end),  # 2: a wrong id in the first files
    )


MODELS = text_models(tower)
