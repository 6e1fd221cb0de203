"""gpt-oss: experts with biases and a clamped gate, sinks, every other layer in a window, YaRN."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import (
    head_size,
    layer_types,
    llama_like,
    read_rotary,
    rms,
    windowed,
)
from topwork.models.families._experts import router_loss
from topwork.nn.moe import ClampedGate, ExpertsSpec, MoeSpec, TopKSoftmaxRouter

SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 32.0,
        "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 16}  # fmt: skip
CASES = [
    {**SIZES, "sliding_window": 4, "rope_parameters": YARN},
    {**SIZES, "attention_bias": False, "swiglu_limit": 0.5, "swiglu_alpha": 1.0,
     "rms_norm_eps": 0.1},
    {**SIZES, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3,
     "tie_word_embeddings": True,
     "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {**SIZES, "output_router_logits": True, "router_aux_loss_coef": 0.5},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias, count = read("attention_bias", True), read.need("num_hidden_layers")
    read.only("hidden_act", "silu")
    read.ignore("experts_per_token", "initial_context_length", "swiglu_limit_alpha")
    other = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    experts = ExpertsSpec(
        read.need("num_local_experts"),
        read.need("intermediate_size"),
        inward=True,
        bias=True,
        gate=ClampedGate(read("swiglu_limit", 7.0), read("swiglu_alpha", 1.702)),
    )
    router = TopKSoftmaxRouter(read("num_experts_per_tok", 4))
    return llama_like(
        read,
        norm=rms(read, "rms-wide", 1e-5),
        head_dim=64,
        rotary=read_rotary(read, head_size(read, 64), theta=150000.0),
        windows=windowed(layer_types(read, other), read("sliding_window", 128)),
        qkv_bias=bias,
        out_bias=bias,
        mlp=MoeSpec(experts, router, "router", router_bias=True),
        attention={"sinks": True},
        router_loss=router_loss(read, 0.9),
    )
