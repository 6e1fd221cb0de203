"""Qwen 1.5 and 2 with experts: Qwen 2 with a gated expert that sees every token."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import gated, layer_types, llama_like, windowed
from topwork.models.families._experts import TABLE, mixed, router_loss, softmax_experts
from topwork.nn.layers import MlpSpec

SIZES = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
CASES = [
    SIZES,
    {**SIZES, "norm_topk_prob": True, "decoder_sparse_step": 2, "hidden_act": "gelu"},
    {**SIZES, "mlp_only_layers": [0], "qkv_bias": False, "tie_word_embeddings": True,
     "rms_norm_eps": 0.1, "rope_theta": 100.0},
    {**SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
     "num_hidden_layers": 3},
    {**SIZES, "output_router_logits": True, "router_aux_loss_coef": 0.5},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    used, first = read("use_sliding_window", False), read("max_window_layers", 28)
    window, count = read("sliding_window", 4096), read.need("num_hidden_layers")
    early = [
        "sliding_attention" if used and i % 2 == 0 and i < first else "full_attention"
        for i in range(count)
    ]
    moe = softmax_experts(
        read,
        read("num_experts", 60),
        read("moe_intermediate_size", 1408),
        shared=MlpSpec(read("shared_expert_intermediate_size", 5632), read("hidden_act", "silu")),
        shared_gate=True,
    )
    return llama_like(
        read,
        windows=windowed(layer_types(read, early), window if used else None),
        qkv_bias=read("qkv_bias", True),
        mlp=mixed(read, moe, gated(read)),
        router_loss=router_loss(read),
        table=TABLE,
    )
