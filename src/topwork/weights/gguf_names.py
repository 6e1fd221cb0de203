"""What each architecture of a GGUF file is called on the Hub: configuration, tensors, layouts.

A config value is a metadata key ("*" stands for the architecture). A tensor's name is that of its
part; `convert` turns what llama.cpp's converter did to the tensor back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Convert = Callable[[str, Tensor, dict[str, Any]], Tensor]
"""(part, tensor, configuration) → the tensor as it lies on the Hub."""


@dataclass(frozen=True)
class Joined:
    """Tensors of a layer (with their ending) that are one on the Hub, at `path` below the layer."""

    parts: tuple[str, ...]
    path: str
    join: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Architecture:
    """`keys`: config key → metadata key. `names`: part → path, of a layer or of the trunk; with "#"
    for a part of the path the tensor holds all experts, which the Hub has one by one."""

    model_type: str
    keys: dict[str, str]
    names: dict[str, str]
    layers: str = "model.layers"
    convert: Convert = lambda part, tensor, config: tensor
    more: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda file, config: {}
    """(file, configuration so far) → what else the configuration has to say."""
    optional: frozenset[str] = field(
        default_factory=lambda: frozenset({"num_key_value_heads", "head_dim", "rope_theta"})
    )
    joined: tuple[Joined, ...] = ()


SIZES = {
    "hidden_size": "*.embedding_length",
    "intermediate_size": "*.feed_forward_length",
    "num_hidden_layers": "*.block_count",
    "num_attention_heads": "*.attention.head_count",
    "num_key_value_heads": "*.attention.head_count_kv",
    "max_position_embeddings": "*.context_length",
    "rope_theta": "*.rope.freq_base",
}
RMS_SIZES = {**SIZES, "rms_norm_eps": "*.attention.layer_norm_rms_epsilon"}
HEADED = {**RMS_SIZES, "head_dim": "*.attention.key_length"}
LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH = {
    **LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}


def halves_apart(part: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """llama.cpp interleaves the two halves of each query and key head: "rotate half" wants them
    apart."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
    if heads is None:
        return tensor
    return tensor.unflatten(0, (config[heads], -1, 2)).transpose(1, 2).flatten(0, 2)


def norms_from_zero(part: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """Gemma's norms multiply by 1 + weight; the file holds the sum."""
    return tensor - 1 if part.endswith("norm") else tensor


def inputs_first(part: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """GPT-2 keeps its linears as [in, out]."""
    linear = part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down") and tensor.dim() == 2
    return tensor.t().contiguous() if linear else tensor


def qkv_by_head(part: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """BLOOM keeps q, k, v side by side for each head; the file has all of q, of k, of v."""
    if part != "attn_qkv":
        return tensor
    return tensor.unflatten(0, (3, config["n_head"], -1)).transpose(0, 1).flatten(0, 2)


def qkv_by_group(part: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """Falcon keeps a group's queries before its key and value; the file has all queries first."""
    if part != "attn_qkv":
        return tensor
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    q, k, v = (
        t.unflatten(0, (groups, -1))
        for t in tensor.unflatten(0, (heads + 2 * groups, -1)).split((heads, groups, groups))
    )
    return torch.cat((q, k, v), 1).flatten(0, 2)


def _gemma_scale(file: Any, config: dict[str, Any], largest: int) -> float:
    """What 1/√ of scales the queries: the head size, but hidden / heads in the largest model."""
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] / config["num_attention_heads"]
    return config["head_dim"]


def _gemma2(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _gemma_scale(file, config, 46),
        "attn_logit_softcapping": file.get("*.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.get("*.final_logit_softcapping", 30.0),
        "sliding_window": file.get("*.attention.sliding_window", 4096),
    }


def _gemma3(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _gemma_scale(file, config, 62),
        "final_logit_softcapping": file.get("*.final_logit_softcapping"),
        "sliding_window": file.get("*.attention.sliding_window", 4096),
        "rope_theta": file.get("*.rope.freq_base", 1e6),
        "rope_local_base_freq": 10000.0,
    }


def _phi3(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    size = config["hidden_size"] // config["num_attention_heads"]
    found: dict[str, Any] = {
        "sliding_window": file.get("*.attention.sliding_window") or None,
        "partial_rotary_factor": file.get("*.rope.dimension_count", size) / size,
    }
    factors = {
        f"{kind}_factor": file.vector(f"rope_factors_{kind}.weight") for kind in ("short", "long")
    }
    if factors["long_factor"] is not None:
        original = file.get("*.rope.scaling.original_context_length", 4096)
        found["rope_scaling"] = {"type": "longrope", **factors}
        found["original_max_position_embeddings"] = original
    return found


def _falcon(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    groups = config.pop("num_key_value_heads", 1)
    new = file.has("blk.0.attn_norm_2.weight")
    return {
        "num_kv_heads": groups,
        "new_decoder_architecture": new,
        "multi_query": not new and groups == 1,
        "bias": file.has("blk.0.attn_qkv.bias"),
    }


def _biased(file: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_bias": file.has("blk.0.attn_q.bias")}


FALCON_SIZES = {
    **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
    "ffn_hidden_size": "*.feed_forward_length",
    "layer_norm_epsilon": "*.attention.layer_norm_epsilon",
}
ARCHITECTURES = {
    "llama": Architecture("llama", HEADED, LLAMA, convert=halves_apart),
    "qwen2": Architecture("qwen2", RMS_SIZES, LLAMA),
    "qwen3": Architecture("qwen3", HEADED, LLAMA),
    "gemma": Architecture("gemma", HEADED, LLAMA, convert=norms_from_zero),
    "gemma2": Architecture("gemma2", HEADED, SANDWICH, convert=norms_from_zero, more=_gemma2),
    "gemma3": Architecture("gemma3_text", HEADED, SANDWICH, convert=norms_from_zero, more=_gemma3),
    "phi3": Architecture(
        "phi3",
        RMS_SIZES,
        {**LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        more=_phi3,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {**SIZES, "norm_epsilon": "*.attention.layer_norm_epsilon"},
        {**LLAMA, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        more=_biased,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "n_embd": "*.embedding_length",
            "n_inner": "*.feed_forward_length",
            "n_layer": "*.block_count",
            "n_head": "*.attention.head_count",
            "n_positions": "*.context_length",
            "layer_norm_epsilon": "*.attention.layer_norm_epsilon",
        },
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        "transformer.h",
        inputs_first,
    ),
    "bloom": Architecture(
        "bloom",
        {
            "hidden_size": "*.embedding_length",
            "n_layer": "*.block_count",
            "n_head": "*.attention.head_count",
            "layer_norm_epsilon": "*.attention.layer_norm_epsilon",
        },
        GPT,
        "transformer.h",
        qkv_by_head,
    ),
    "falcon": Architecture(
        "falcon",
        FALCON_SIZES,
        GPT,
        "transformer.h",
        qkv_by_group,
        _falcon,
        frozenset({"num_key_value_heads", "rope_theta", "ffn_hidden_size"}),
    ),
}
