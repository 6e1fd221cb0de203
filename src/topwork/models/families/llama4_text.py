"""Llama 4 (text): chunked attention, layers without positions, experts that weigh their input."""

from dataclasses import replace
from typing import Any

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec, LayerSpec
from topwork.models.families._common import head_size, layer_types, llama_like, read_rotary, rms
from topwork.nn.layers import MlpSpec, QkNorm, Temperature
from topwork.nn.moe import ExpertsSpec, MoeSpec, SigmoidRouter
from topwork.nn.norms import NormSpec

SIZES = {"num_local_experts": 4, "head_dim": 12}
CASES = [
    {**SIZES, "attention_chunk_size": 6, "no_rope_layers": [1, 0]},
    {**SIZES, "num_experts_per_tok": 2, "use_qk_norm": False, "attention_bias": True,
     "moe_layers": [1], "intermediate_size_mlp": 48, "hidden_act": "gelu"},
    {**SIZES, "no_rope_layers": [0, 1], "floor_scale": 4, "attn_scale": 0.7, "rms_norm_eps": 0.1,
     "attention_chunk_size": 5},
    {**SIZES, "num_hidden_layers": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
     "rope_theta": 100.0, "no_rope_layer_interval": 3, "tie_word_embeddings": True,
     "attn_temperature_tuning": False, "floor_scale": 4},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    read.only("router_jitter_noise", 0.0)
    read.only("output_router_logits", False)
    read.ignore("router_aux_loss_coef")
    bias, count = read("attention_bias", False), read.need("num_hidden_layers")
    norm, act = rms(read, eps=1e-5), read("hidden_act", "silu")
    every, step = read("no_rope_layer_interval", 4), read("interleave_moe_layer_step", 1)
    turns = read("no_rope_layers") or [int((i + 1) % every != 0) for i in range(count)]
    kinds = layer_types(read, ["chunked_attention" if turn else "full_attention" for turn in turns])
    sparse = read("moe_layers", list(range(step - 1, count, step)))
    width = read.need("intermediate_size")
    moe = MoeSpec(
        ExpertsSpec(read("num_local_experts", 16), width, act, inward=True),
        SigmoidRouter(read("num_experts_per_tok", 1)),
        "router",
        shared=MlpSpec(width, act),
        weigh_input=True,
    )
    dense = MlpSpec(read("intermediate_size_mlp", 16384), act)
    rotary = read_rotary(read, head_size(read), theta=5e5, interleaved=True, wide=True)
    whole = llama_like(
        read,
        norm=norm,
        rotary=[rotary if turn else None for turn in turns],
        qkv_bias=bias,
        out_bias=bias,
        mlp=[moe if i in sparse else dense for i in range(count)],
        layer={"mlp_name": "feed_forward"},
    )
    l2 = QkNorm(NormSpec("l2", norm.eps), after_rotary=True)
    l2 = l2 if read("use_qk_norm", True) else None
    tuned = Temperature(read("floor_scale", 8192), read("attn_scale", 0.1))
    tuned = tuned if read("attn_temperature_tuning", True) else None
    chunk = read("attention_chunk_size", 8192)

    def finished(layer: LayerSpec, turn: int, kind: str) -> LayerSpec:
        attention: Any = layer.attention
        attention = replace(
            attention,
            chunk=chunk if kind == "chunked_attention" else None,
            qk_norm=l2 if turn else None,
            temperature=None if turn else tuned,
        )
        return replace(layer, attention=attention)

    return replace(whole, layers=tuple(map(finished, whole.layers, turns, kinds)))
