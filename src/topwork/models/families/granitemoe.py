"""Granite 3 with experts."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import llama_like, multipliers
from topwork.models.families._experts import router_loss
from topwork.nn.moe import ExpertsSpec, MoeSpec, TopKSoftmaxRouter
from topwork.weights import Rename, Table

SIZES = {"num_local_experts": 4, "num_experts_per_tok": 3}
CASES = [
    SIZES,
    {**SIZES, "embedding_multiplier": 12.0, "attention_multiplier": 0.3, "hidden_act": "gelu"},
    {**SIZES, "residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True},
    {**SIZES, "attention_bias": True, "rope_theta": 100.0, "rms_norm_eps": 0.1},
    {**SIZES, "output_router_logits": True, "router_aux_loss_coef": 0.5},
]
TABLE = Table(
    (
        Rename("router.layer", "router"),
        Rename("input_linear.weight", "experts.gate_up_proj"),
        Rename("output_linear.weight", "experts.down_proj"),
    )
)


def spec(read: ConfigReader) -> DecoderSpec:
    bias, fields = read("attention_bias", False), multipliers(read)
    fields["layer"]["mlp_name"] = "block_sparse_moe"
    experts = ExpertsSpec(
        read("num_local_experts", 8), read.need("intermediate_size"), read("hidden_act", "silu")
    )
    router = TopKSoftmaxRouter(read("num_experts_per_tok", 2))
    return llama_like(
        read,
        qkv_bias=bias,
        out_bias=bias,
        mlp=MoeSpec(experts, router, "router"),
        router_loss=router_loss(read),
        table=TABLE,
        **fields,
    )
