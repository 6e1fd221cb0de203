"""GGUF files of models with experts, written with `gguf` from random models of the peer, give
their logits."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers

from topwork import AutoModelForCausalLM
from topwork.errors import CheckpointError

SIZES = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "beta_fast": 8.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 16}  # fmt: skip
FAMILIES = {
    "llama": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2moe": ("qwen2_moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40, "norm_topk_prob": False,
    }),
    "qwen3moe": ("qwen3_moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 24,
        "norm_topk_prob": True,
    }),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "granite": ("granite", {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    }),
    "granitemoe": ("granitemoe", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    }),
    "gpt-oss": ("gpt_oss", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5,
        "rope_theta": None, "rope_parameters": {**YARN, "truncate": False},
    }),
    "deepseek2": ("deepseek_v3", {
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 2,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4,
        "v_head_dim": 10, "routed_scaling_factor": 0.7, "num_key_value_heads": 4,
        "rope_theta": None,
        "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.8},
    }),
}  # fmt: skip


def peer(name):
    kind, options = FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        buffers = [b for n, b in model.named_buffers() if n in model.state_dict()]
        for value in (*model.parameters(), *buffers):
            value.copy_(torch.randn_like(value) * (0.2 if value.dim() > 1 else 0.5))
    return model.eval()


def metadata(name, config):
    """What llama.cpp's converter writes."""
    found = {
        "block_count": config.num_hidden_layers, "context_length": 64, "embedding_length": 64,
        "feed_forward_length": 96, "attention.head_count": 4,
        "attention.head_count_kv": config.num_key_value_heads, "rope.freq_base": 5000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    values = config.to_dict()
    count = values.get("num_local_experts") or values.get("num_experts")
    count = values.get("n_routed_experts") or count
    if count:
        found |= {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if name in ("qwen3moe", "gpt-oss"):
        found["attention.key_length"] = config.head_dim
    if name == "gpt-oss":
        found["attention.sliding_window"] = 5
    if name.startswith("granite"):
        found |= {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5,
                  "logit_scale": 2.0}  # fmt: skip
    if name in ("gpt-oss", "deepseek2"):
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                  "rope.scaling.original_context_length": 16,
                  "rope.scaling.yarn_beta_fast": 8.0}  # fmt: skip
    if name == "deepseek2":
        found |= {
            "expert_shared_count": 2, "leading_dense_block_count": 1, "expert_group_count": 4,
            "expert_group_used_count": 2, "expert_weights_scale": 0.7, "expert_weights_norm": True,
            "expert_gating_func": 2, "attention.q_lora_rank": 32, "attention.kv_lora_rank": 32,
            "rope.dimension_count": 4, "attention.key_length_mla": 16,
            "attention.value_length_mla": 10, "attention.key_length": 36,
            "attention.value_length": 32, "rope.scaling.yarn_log_multiplier": 0.08,
            "attention.head_count_kv": 1,
        }  # fmt: skip
    return found


def interleaved(weight, heads):
    """What llama.cpp's converter does to queries and keys of Llama's kind."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def block(name, layer, config):
    """The tensors of one layer, by their names in the file."""
    attention, found = layer.self_attn, {}
    found["attn_norm.weight"] = layer.input_layernorm.weight
    second = "post_attention_norm" if name == "gpt-oss" else "ffn_norm"
    found[f"{second}.weight"] = layer.post_attention_layernorm.weight
    plain = {
        "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
        "attn_q_norm": "q_norm", "attn_k_norm": "k_norm", "attn_q_a": "q_a_proj",
        "attn_q_a_norm": "q_a_layernorm", "attn_q_b": "q_b_proj",
        "attn_kv_a_mqa": "kv_a_proj_with_mqa", "attn_kv_a_norm": "kv_a_layernorm",
    }  # fmt: skip
    for part, path in plain.items():
        module = getattr(attention, path, None)
        for leaf, value in module.named_parameters() if module is not None else ():
            found[f"{part}.{leaf}"] = value
    if name in ("llama", "granite", "granitemoe"):
        for part, heads in (("attn_q", 4), ("attn_k", 2)):
            found[f"{part}.weight"] = interleaved(found[f"{part}.weight"], heads)
    if name == "gpt-oss":
        found["attn_sinks.weight"] = attention.sinks
    if name == "deepseek2":
        both = attention.kv_b_proj.weight.view(4, 22, 32)
        found["attn_k_b.weight"] = both[:, :12].transpose(1, 2)
        found["attn_v_b.weight"] = both[:, 12:]
    mlp = layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp
    return found | feed(name, mlp)


def gated(mlp, ending=""):
    return {f"ffn_{n}{ending}.weight": getattr(mlp, f"{n}_proj").weight
            for n in ("gate", "up", "down")}  # fmt: skip


def feed(name, mlp):
    if hasattr(mlp, "gate_proj"):
        return gated(mlp)
    experts = mlp.experts
    if name == "gpt-oss":
        wide, bias = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
        return {
            "ffn_gate_inp.weight": mlp.router.weight, "ffn_gate_inp.bias": mlp.router.bias,
            "ffn_gate_exps.weight": wide[:, 0::2], "ffn_up_exps.weight": wide[:, 1::2],
            "ffn_gate_exps.bias": bias[:, 0::2], "ffn_up_exps.bias": bias[:, 1::2],
            "ffn_down_exps.weight": experts.down_proj.transpose(1, 2),
            "ffn_down_exps.bias": experts.down_proj_bias,
        }  # fmt: skip
    gate, up = experts.gate_up_proj.chunk(2, 1)
    router = mlp.router if name == "granitemoe" else mlp.gate
    found = {"ffn_gate_inp.weight": router.weight, "ffn_gate_exps.weight": gate,
             "ffn_up_exps.weight": up, "ffn_down_exps.weight": experts.down_proj}  # fmt: skip
    if name == "qwen2moe":
        found |= gated(mlp.shared_expert, "_shexp")
        found["ffn_gate_inp_shexp.weight"] = mlp.shared_expert_gate.weight[0]
    if name == "deepseek2":
        found |= gated(mlp.shared_experts, "_shexp")
        found["exp_probs_b.bias"] = mlp.gate.e_score_correction_bias
    return found


def write(path, name, values, tensors, kind=None):
    """`kind`: how the experts are coded."""
    writer = gguf.GGUFWriter(path, name)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
              str: writer.add_string}  # fmt: skip
    for key, value in values.items():
        adders[type(value)](f"{name}.{key}", value)
    for key, value in tensors.items():
        if kind is not None and "_exps.weight" in key:
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(name, model):
    found = {"token_embd.weight": model.model.embed_tokens.weight,
             "output_norm.weight": model.model.norm.weight}  # fmt: skip
    if not model.config.tie_word_embeddings:
        found["output.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        found |= {f"blk.{i}.{k}": v for k, v in block(name, layer, model.config).items()}
    return {k: np.ascontiguousarray(v.detach().numpy()) for k, v in found.items()}


IDS = torch.randint(0, 32, (2, 40), generator=torch.Generator().manual_seed(0))


def close(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_files_logits_are_those_of_the_model_it_was_written_from(name, tmp_path):
    theirs = peer(name)
    write(tmp_path / "m.gguf", name, metadata(name, theirs.config), tensors_of(name, theirs))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert ours.config.model_type == FAMILIES[name][0]
    with torch.no_grad():
        assert close(ours(IDS).logits, theirs(IDS).logits)


def test_coded_experts_are_decoded_one_by_one(tmp_path):
    theirs = peer("qwen3moe")
    tensors, kind = tensors_of("qwen3moe", theirs), gguf.GGMLQuantizationType.Q8_0
    write(tmp_path / "m.gguf", "qwen3moe", metadata("qwen3moe", theirs.config), tensors, kind)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    for part, place in (("gate", slice(0, 32)), ("up", slice(32, 64))):
        plain = tensors[f"blk.1.ffn_{part}_exps.weight"]
        wanted = gguf.dequantize(gguf.quants.quantize(plain, kind), kind)
        found = ours.model.layers[1].mlp.experts.gate_up_proj[:, place]
        assert torch.equal(found, torch.from_numpy(wanted))


def test_the_first_mixtral_files_have_their_experts_one_by_one(tmp_path):
    theirs = peer("llama")
    tensors = {}
    for key, value in tensors_of("llama", theirs).items():
        if "_exps." in key:
            parts = {key.replace("_exps.", f".{i}."): v for i, v in enumerate(value)}
            tensors |= parts
        else:
            tensors[key] = value
    write(tmp_path / "m.gguf", "llama", metadata("llama", theirs.config), tensors)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    with torch.no_grad():
        assert close(ours(IDS).logits, theirs(IDS).logits)


def test_latent_keys_and_values_may_lie_together(tmp_path):
    theirs = peer("deepseek2")
    tensors = tensors_of("deepseek2", theirs)
    for i, layer in enumerate(theirs.model.layers):
        del tensors[f"blk.{i}.attn_k_b.weight"], tensors[f"blk.{i}.attn_v_b.weight"]
        whole = layer.self_attn.kv_b_proj.weight.detach().numpy()
        tensors[f"blk.{i}.attn_kv_b.weight"] = whole
    values = metadata("deepseek2", theirs.config)
    values |= {"attention.key_length": 16, "attention.value_length": 10}
    del values["attention.key_length_mla"], values["attention.value_length_mla"]
    write(tmp_path / "m.gguf", "deepseek2", values, tensors)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    with torch.no_grad():
        assert close(ours(IDS).logits, theirs(IDS).logits)


def test_what_is_missing_or_not_supported_is_named(tmp_path):
    theirs = peer("granitemoe")
    tensors, values = tensors_of("granitemoe", theirs), metadata("granitemoe", theirs.config)
    del tensors["blk.1.ffn_up_exps.weight"]
    write(tmp_path / "m.gguf", "granitemoe", values, tensors)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_gate_exps\.weight is there, but not"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    theirs = peer("deepseek2")
    values = {**metadata("deepseek2", theirs.config), "expert_gating_func": 1}
    write(tmp_path / "m.gguf", "deepseek2", values, tensors_of("deepseek2", theirs))
    with pytest.raises(CheckpointError, match="only DeepSeek-V3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
