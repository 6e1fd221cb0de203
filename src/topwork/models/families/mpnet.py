"""MPNet (all-mpnet-base-v2): BERT with a bias by distance that all layers share."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.encoder import BlockNames
from topwork.models.encoder_heads import FamilySpec, encoder_models
from topwork.models.families._encoders import roberta_like
from topwork.nn.paths import part, place
from topwork.nn.relative import relative_bias

CASES = [
    {},
    {"pad_token_id": 4, "hidden_act": "relu", "layer_norm_eps": 0.1},
    {"num_attention_heads": 2, "tie_word_embeddings": False},
]
NAMES = BlockNames(
    "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
    "attention.LayerNorm",
)  # fmt: skip


@dataclass(frozen=True)
class DistanceBias:
    """A learned score per bucket of distances and head."""

    buckets: int
    heads: int
    path: str = "encoder.relative_attention_bias"

    def place(self, encoder: nn.Module) -> None:
        place(encoder, self.path, nn.Embedding(self.buckets, self.heads))

    def shared(
        self, encoder: nn.Module, positions: Tensor, longest: int, like: Tensor
    ) -> ops.ScoreTerms:
        table = part(encoder, self.path).weight
        return ops.ScoreTerms(bias=relative_bias(table, longest, longest, 128, True))


def family(read: ConfigReader) -> FamilySpec:
    read.ignore("pad_token_id")  # positions begin at 2, whatever it is
    buckets = read("relative_attention_num_buckets", 32)
    if buckets != 32:
        raise ConfigError(f"relative_attention_num_buckets={buckets}: MPNet is defined for 32")
    found = roberta_like(read, "mpnet", NAMES, first=2, types=0)
    bias = DistanceBias(buckets, read.need("num_attention_heads"))
    return replace(found, encoder=replace(found.encoder, relation=bias))


MODELS = encoder_models(family)
