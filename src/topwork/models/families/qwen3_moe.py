"""Qwen 3 with experts: Qwen 3 in which most layers have many small experts."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import gated, llama_like, rms
from topwork.models.families._experts import TABLE, mixed, router_loss, softmax_experts
from topwork.nn.layers import QkNorm

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12}
CASES = [
    SIZES,
    {**SIZES, "norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True},
    {**SIZES, "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 4,
     "tie_word_embeddings": True, "rms_norm_eps": 0.1, "hidden_act": "gelu", "rope_theta": 100.0},
    {**SIZES, "output_router_logits": True, "router_aux_loss_coef": 0.5},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias, window = read("attention_bias", False), read("sliding_window", 4096)
    window = window if read("use_sliding_window", False) else None
    read.ignore("max_window_layers")
    count = read("num_experts", read("num_local_experts", 128))
    moe = softmax_experts(read, count, read("moe_intermediate_size", 768))
    return llama_like(
        read,
        windows=[window] * read.need("num_hidden_layers"),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QkNorm(rms(read)),
        mlp=mixed(read, moe, gated(read)),
        router_loss=router_loss(read),
        table=TABLE,
        answers="transformer",
    )
