"""Command R: attention and MLP side by side behind one LayerNorm, interleaved rotary."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import ONE_NORM, DecoderSpec, HeadSpec
from topwork.models.families._common import head_size, llama_like, read_rotary
from topwork.nn.layers import QkNorm
from topwork.nn.norms import NormSpec

CASES = [
    {},
    {"use_qk_norm": True, "tie_word_embeddings": True, "num_attention_heads": 4,
     "num_key_value_heads": 2, "rope_theta": 100.0},
    {"attention_bias": True, "logit_scale": 0.5, "layer_norm_eps": 0.1, "hidden_act": "gelu"},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias, norm = read("attention_bias", False), NormSpec("layer", read("layer_norm_eps", 1e-5))
    return llama_like(
        read,
        norm=norm,
        rotary=read_rotary(read, head_size(read), theta=5e5, interleaved=True, wide=True),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QkNorm(norm, "heads") if read("use_qk_norm", False) else None,
        layer={"norms": ONE_NORM, "parallel": True},
        tied=True,
        head=HeadSpec(scale=read("logit_scale", 0.0625)),
    )
