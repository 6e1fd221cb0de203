"""DeepSeek-V3 and R1: latent attention, experts in groups, the first layers dense."""

import math
from dataclasses import replace

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import gated, llama_like, read_rotary
from topwork.models.families._experts import PER_EXPERT
from topwork.nn.latent import LatentAttentionSpec
from topwork.nn.layers import MlpSpec
from topwork.nn.moe import ExpertsSpec, GroupedRouter, MoeSpec
from topwork.nn.rotary import RotarySpec
from topwork.weights import Table

TINY = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5,
    "num_key_value_heads": 5, "max_position_embeddings": 64,
}  # fmt: skip
SIZES = {
    "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "mscale": 1.0,
        "mscale_all_dim": 0.7, "original_max_position_embeddings": 16}  # fmt: skip
CASES = [
    SIZES,
    {**SIZES, "q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2,
     "rope_interleave": False},
    {**SIZES, "rope_parameters": YARN, "norm_topk_prob": False, "routed_scaling_factor": 0.7,
     "first_k_dense_replace": 0},
    {**SIZES, "n_group": 2, "topk_group": 1, "tie_word_embeddings": True, "hidden_act": "gelu",
     "rope_theta": 100.0, "rms_norm_eps": 0.1},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    read.only("output_router_logits", False)
    read.only("topk_method", "noaux_tc")
    read.only("scoring_func", "sigmoid")
    read.only("moe_layer_freq", 1)
    read.ignore("qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef")
    heads, count = read.need("num_attention_heads"), read.need("num_hidden_layers")
    plain, turned = read("qk_nope_head_dim", 128), read("qk_rope_head_dim", 64)
    rotary = read_rotary(read, turned, interleaved=read("rope_interleave", True))
    attention = LatentAttentionSpec(
        heads,
        plain,
        turned,
        read("v_head_dim", 128),
        read.get("q_lora_rank", 1536),
        read("kv_lora_rank", 512),
        rotary,
        (plain + turned) ** -0.5 * temperature(rotary) ** 2,
        read("attention_bias", False),
        read.rate("attention_dropout"),
    )
    act, width = read("hidden_act", "silu"), read("moe_intermediate_size", 2048)
    moe = MoeSpec(
        ExpertsSpec(read("n_routed_experts", 256), width, act),
        GroupedRouter(
            read("num_experts_per_tok", 8),
            read("n_group", 8),
            read("topk_group", 4),
            read("norm_topk_prob", True),
            read("routed_scaling_factor", 2.5),
        ),
        shared=MlpSpec(width * read("n_shared_experts", 1), act),
        shared_name="shared_experts",
    )
    dense, first = gated(read), read("first_k_dense_replace", 3)
    # The layers behind the last predict further tokens; they are no part of the plain model.
    further = [count + i for i in range(read("num_nextn_predict_layers", 1))]
    whole = llama_like(
        read,
        rotary=rotary,
        mlp=[dense if i < first else moe for i in range(count)],
        table=Table(PER_EXPERT, drop=tuple(rf"layers\.{i}\." for i in further)),
    )
    return replace(
        whole, layers=tuple(replace(layer, attention=attention) for layer in whole.layers)
    )


def temperature(rotary: RotarySpec) -> float:
    """YaRN's factor on queries and keys by `mscale_all_dim`."""
    if not rotary.mscale_all_dim or rotary.factor <= 1:
        return 1.0
    return 0.1 * rotary.mscale_all_dim * math.log(rotary.factor) + 1.0
