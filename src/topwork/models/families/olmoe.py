"""OLMoE: 64 small experts, norms over the whole width of queries and keys."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import llama_like, rms
from topwork.models.families._experts import TABLE, router_loss, softmax_experts
from topwork.nn.layers import QkNorm

SIZES = {"num_experts": 4, "num_experts_per_tok": 2}
CASES = [
    SIZES,
    {**SIZES, "norm_topk_prob": True, "clip_qkv": 0.4, "attention_bias": True},
    {**SIZES, "tie_word_embeddings": True, "rms_norm_eps": 0.1, "hidden_act": "gelu",
     "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 100.0},
    {**SIZES, "output_router_logits": True, "router_aux_loss_coef": 0.5},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias, norm = read("attention_bias", False), rms(read, eps=1e-5)
    return llama_like(
        read,
        norm=norm,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QkNorm(norm, "width"),
        mlp=softmax_experts(read, read("num_experts", 64), read.need("intermediate_size")),
        attention={"clip": read("clip_qkv")},
        router_loss=router_loss(read, 0.01),
        table=TABLE,
    )
