"""The architectures of GGUF files with experts: stacked there, one tensor for all of a layer's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topwork.errors import CheckpointError
from topwork.weights.gguf_names import (
    HEADED,
    LLAMA,
    RMS_SIZES,
    Architecture,
    Joined,
    halves_apart,
)

COUNTS = {"num_experts": "*.expert_count", "num_experts_per_tok": "*.expert_used_count"}
LOCAL = {"num_local_experts": "*.expert_count", "num_experts_per_tok": "*.expert_used_count"}
GATED = {
    **LLAMA,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.#.gate_proj",
    "ffn_up_exps": "mlp.experts.#.up_proj",
    "ffn_down_exps": "mlp.experts.#.down_proj",
}
MULTIPLIERS = {
    "attention_multiplier": "*.attention.scale",
    "embedding_multiplier": "*.embedding_scale",
    "residual_multiplier": "*.residual_scale",
    "logits_scaling": "*.logit_scale",
}
GRANITE = {**RMS_SIZES, **MULTIPLIERS}
MAY_LACK = frozenset({"num_key_value_heads", "head_dim", "rope_theta", *MULTIPLIERS})


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _transposed(parts: list[Tensor]) -> Tensor:
    """[E, out, in] → [E, in, out]."""
    return parts[0].transpose(1, 2)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Gates [E, I, C] before ups."""
    return torch.cat(parts, 1)


def _alternating(parts: list[Tensor]) -> Tensor:
    """Gates and ups [E, I, C] as the alternating columns of [E, C, 2I]."""
    return torch.stack(parts, 2).flatten(1, 2).transpose(1, 2)


def _alternating_biases(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, 2).flatten(1)


def _keys_and_values(parts: list[Tensor]) -> Tensor:
    """Of each head first what makes its key [H, R, N], transposed, then its value [H, D, R]."""
    return torch.cat((parts[0].transpose(1, 2), parts[1]), 1).flatten(0, 1)


def _width(file: Any) -> int:
    """The width of an expert; not all files say it."""
    return file.shape("ffn_gate_exps.weight")[1]


def _mixtral(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {"rope_theta": file.get("*.rope.freq_base", 10000.0)}


def _qwen2(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "moe_intermediate_size": _width(file),
        "shared_expert_intermediate_size": file.shape("ffn_gate_shexp.weight")[0],
        "norm_topk_prob": file.get("*.expert_weights_norm", False),
    }


def _qwen3(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "moe_intermediate_size": _width(file),
        "norm_topk_prob": file.get("*.expert_weights_norm", True),
    }


def _one_row(part: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """The shared expert's gate is a vector in the file."""
    return tensor.reshape(1, -1) if part == "ffn_gate_inp_shexp" else tensor


def _gpt_oss(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "intermediate_size": _width(file),
        "attention_bias": file.has("blk.0.attn_q.bias"),
    }
    if config.get("rope_scaling", {}).get("rope_type") == "yarn":
        found["rope_scaling"] = {**config["rope_scaling"], "truncate": False}
    return found


def _deepseek(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    if file.get("*.expert_gating_func", 1) != 2:
        raise CheckpointError(
            f"{file.path}: only DeepSeek-V3's experts behind sigmoids are supported, not V2's "
            "behind a softmax (deepseek2.expert_gating_func)"
        )
    turned = config["qk_rope_head_dim"]
    key = file.get("*.attention.key_length_mla", file.get("*.attention.key_length"))
    found: dict[str, Any] = {
        "num_key_value_heads": config["num_attention_heads"],
        "qk_nope_head_dim": key - turned,
        "v_head_dim": file.get(
            "*.attention.value_length_mla", file.get("*.attention.value_length")
        ),
        "moe_intermediate_size": _width(file),
        "norm_topk_prob": file.get("*.expert_weights_norm", True),
        "num_nextn_predict_layers": 0,
    }
    stretch = file.get("*.rope.scaling.yarn_log_multiplier")
    if stretch and "rope_scaling" in config:
        scales = {"mscale": stretch / 0.1, "mscale_all_dim": stretch / 0.1}
        found["rope_scaling"] = {**config["rope_scaling"], **scales}
    return {**found, "q_lora_rank": config["q_lora_rank"]}


MIXTRAL = Architecture("mixtral", {**HEADED, **LOCAL}, {
    **GATED,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.#.w1",
    "ffn_up_exps": "block_sparse_moe.experts.#.w3",
    "ffn_down_exps": "block_sparse_moe.experts.#.w2",
}, convert=halves_apart, more=_mixtral)  # fmt: skip
SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
GPT_OSS_JOINED = (
    Joined(("attn_sinks.weight",), "self_attn.sinks", _only),
    Joined(("ffn_gate_exps.weight", "ffn_up_exps.weight"), "mlp.experts.gate_up_proj",
           _alternating),
    Joined(("ffn_gate_exps.bias", "ffn_up_exps.bias"), "mlp.experts.gate_up_proj_bias",
           _alternating_biases),
    Joined(("ffn_down_exps.weight",), "mlp.experts.down_proj", _transposed),
    Joined(("ffn_down_exps.bias",), "mlp.experts.down_proj_bias", _only),
)  # fmt: skip
EXPERTS = {
    "qwen2moe": Architecture(
        "qwen2_moe", {**RMS_SIZES, **COUNTS},
        {**GATED, **SHARED, "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        convert=_one_row, more=_qwen2,
    ),
    "qwen3moe": Architecture("qwen3_moe", {**HEADED, **COUNTS}, GATED, more=_qwen3),
    "olmoe": Architecture("olmoe", {**RMS_SIZES, **COUNTS}, GATED),
    "granite": Architecture("granite", GRANITE, LLAMA, convert=halves_apart, optional=MAY_LACK),
    "granitemoe": Architecture(
        "granitemoe", {**GRANITE, **LOCAL},
        {**LLAMA, "ffn_gate_inp": "block_sparse_moe.router.layer"},
        convert=halves_apart, optional=MAY_LACK,
        joined=(
            Joined(("ffn_gate_exps.weight", "ffn_up_exps.weight"),
                   "block_sparse_moe.input_linear.weight", _side_by_side),
            Joined(("ffn_down_exps.weight",), "block_sparse_moe.output_linear.weight", _only),
        ),
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        {
            **{k: v for k, v in HEADED.items() if k != "intermediate_size"}, **LOCAL,
            "sliding_window": "*.attention.sliding_window",
        },
        {**LLAMA, "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
        more=_gpt_oss, joined=GPT_OSS_JOINED,
    ),
    "deepseek2": Architecture(
        "deepseek_v3",
        {
            **RMS_SIZES, "n_routed_experts": "*.expert_count",
            "num_experts_per_tok": "*.expert_used_count",
            "n_shared_experts": "*.expert_shared_count",
            "first_k_dense_replace": "*.leading_dense_block_count",
            "routed_scaling_factor": "*.expert_weights_scale",
            "n_group": "*.expert_group_count", "topk_group": "*.expert_group_used_count",
            "q_lora_rank": "*.attention.q_lora_rank", "kv_lora_rank": "*.attention.kv_lora_rank",
            "qk_rope_head_dim": "*.rope.dimension_count",
        },
        {
            **GATED, **{k: v.replace("expert.", "experts.") for k, v in SHARED.items()},
            "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
        },
        more=_deepseek,
        optional=frozenset({
            "num_key_value_heads", "rope_theta", "q_lora_rank", "n_group", "topk_group",
            "routed_scaling_factor",
        }),
        joined=(
            Joined(("attn_k_b.weight", "attn_v_b.weight"), "self_attn.kv_b_proj.weight",
                   _keys_and_values),
            Joined(("exp_probs_b.bias",), "mlp.gate.e_score_correction_bias", _only),
        ),
    ),
}  # fmt: skip
