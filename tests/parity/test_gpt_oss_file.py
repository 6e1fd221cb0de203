"""gpt-oss as it is published: experts as 4-bit floats with a shared power of two (MXFP4), the rest
bf16, in a file written here by hand."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from topwork import AutoModelForCausalLM, Config
from topwork.errors import CheckpointError

LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LEVELS = torch.cat((LEVELS, -LEVELS))
# The published keys, at the size of a test.
CONFIG = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 60, "experts_per_token": 2, "head_dim": 16, "hidden_act": "silu",
    "hidden_size": 64, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 96, "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "num_local_experts": 4, "output_router_logits": False, "pad_token_id": 59,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 5, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
    "vocab_size": 61,
}  # fmt: skip


def coded(weight):
    """[E, in, out] → blocks [E, out, groups, 16] and scales [E, out, groups], and their value."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1, keepdim=True).log2().floor() - 2
    codes = ((groups / 2**exponent)[..., None] - LEVELS).abs().argmin(-1)
    value = (LEVELS[codes] * 2**exponent).flatten(2).transpose(1, 2).bfloat16()
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).byte()
    return blocks, (exponent[..., 0] + 127).byte(), value.contiguous()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The published layout, and the same values as plain weights."""
    torch.manual_seed(0)
    plain, published = (tmp_path_factory.mktemp(name) for name in ("plain", "published"))
    values = json.loads(json.dumps(CONFIG))
    del values["quantization_config"]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GptOssConfig(**values), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape) * size)
    tensors, exact = {}, {}
    for name, value in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], exact[name] = coded(value)
        else:
            tensors[name] = exact[name] = value
    names = sorted(tensors)  # in two shards, a weight's parts apart
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, published / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in shards.items() for n in part}}
    (published / "model.safetensors.index.json").write_text(json.dumps(index))
    (published / "config.json").write_text(json.dumps(CONFIG))
    save_file(exact, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text(json.dumps(values))
    return plain, published


IDS = torch.randint(0, 61, (2, 45), generator=torch.Generator().manual_seed(1))
# Far beyond the original context; the mask keeps the peer from taking the gaps for borders.
INPUTS = {
    "input_ids": IDS, "attention_mask": torch.ones_like(IDS),
    "position_ids": 2500 * torch.arange(45)[None],
}  # fmt: skip


def test_the_published_layout_is_the_dequantised_model(folders):
    plain, published = folders
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    ours = AutoModelForCausalLM.from_pretrained(published, dtype="float32")
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with torch.no_grad():
        wanted, found = theirs(**INPUTS).logits, ours(**INPUTS).logits
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-5


def test_the_peers_own_dequantised_load_agrees(folders):
    _, published = folders
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        published, quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16, attn_implementation="eager",
    )  # fmt: skip
    ours = AutoModelForCausalLM.from_pretrained(published)
    assert ours.dtype == torch.bfloat16
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_what_is_saved_is_plain_and_loads_in_the_peer(folders, tmp_path):
    _, published = folders
    ours = AutoModelForCausalLM.from_pretrained(published)
    ours.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in again.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("option", ["truncate", "beta_fast"])
def test_yarn_is_read_from_the_published_keys(folders, option):
    _, published = folders
    values = json.loads((published / "config.json").read_text())
    values["rope_scaling"][option] = True if option == "truncate" else 4.0
    other = AutoModelForCausalLM.from_pretrained(published, config=Config(**values))
    ours = AutoModelForCausalLM.from_pretrained(published)
    with torch.no_grad():
        assert not torch.allclose(ours(**INPUTS).logits, other(**INPUTS).logits, atol=1e-2)


def test_scales_that_are_missing_are_named(folders, tmp_path):
    _, published = folders
    tensors = {}
    for file in sorted(published.glob("*.safetensors")):
        tensors |= load_file(file)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.1\.mlp\.experts\.down_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
