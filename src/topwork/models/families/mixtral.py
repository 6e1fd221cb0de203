"""Mixtral: Mistral with eight experts, of which each token passes two."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import head_size, llama_like, read_rotary, rms, same_window
from topwork.models.families._experts import router_loss
from topwork.nn.moe import ExpertsSpec, MoeSpec, SoftmaxRouter
from topwork.weights import Pack, Rename, Table

CASES = [
    {"num_local_experts": 4},
    {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 4, "hidden_act": "gelu"},
    {"num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 12, "rope_theta": 100.0,
     "tie_word_embeddings": True, "rms_norm_eps": 0.1},
    {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
]  # fmt: skip
TABLE = Table(
    (
        Rename("block_sparse_moe", "mlp"),
        Pack(("mlp.experts.#.w1.weight", "mlp.experts.#.w3.weight"), "mlp.experts.gate_up_proj"),
        Pack(("mlp.experts.#.w2.weight",), "mlp.experts.down_proj"),
    )
)


def spec(read: ConfigReader) -> DecoderSpec:
    read.only("router_jitter_noise", 0.0)
    experts = ExpertsSpec(
        read("num_local_experts", 8), read.need("intermediate_size"), read("hidden_act", "silu")
    )
    return llama_like(
        read,
        norm=rms(read, eps=1e-5),
        rotary=read_rotary(read, head_size(read), theta=1e6),
        windows=same_window(read),
        mlp=MoeSpec(experts, SoftmaxRouter(read("num_experts_per_tok", 2))),
        router_loss=router_loss(read),
        table=TABLE,
    )
