"""GLM-4-0414: GLM with a norm behind each branch too."""

from dataclasses import replace

from topwork.models.config import ConfigReader
from topwork.models.decoder import BlockNorms, DecoderSpec
from topwork.models.families import glm

CASES = glm.CASES
NORMS = BlockNorms(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)


def spec(read: ConfigReader) -> DecoderSpec:
    plain = glm.spec(read)
    return replace(plain, layers=tuple(replace(layer, norms=NORMS) for layer in plain.layers))
