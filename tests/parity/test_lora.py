"""LoRA against peft, option by option, on transformers' models and on ours; files both ways."""

from __future__ import annotations

import pytest
import torch
import transformers

import peft
import topwork
from topwork.peft import LoraConfig, PeftModel, get_peft_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": None},
    {"target_modules": "all-linear", "lora_alpha": 32},
    {"target_modules": r".*\.1\..*(up|down)_proj", "r": 3},
    {"target_modules": ALL, "exclude_modules": ["q_proj"], "use_rslora": True},
    {"target_modules": ALL, "layers_to_transform": [1]},
    {"target_modules": ALL, "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 99}},
    {"target_modules": ["q_proj"], "bias": "all"},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens", "v_proj"]},
]
GPT2 = [
    {"target_modules": None, "fan_in_fan_out": True},
    {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "lora_only"},
]
CASES = [("qwen2", o) for o in OPTIONS] + [("gpt2", o) for o in GPT2]
each = pytest.mark.parametrize(("family", "options"), CASES, ids=range(len(CASES)))


def base(family):
    torch.manual_seed(0)
    sizes = (
        {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
        if family == "gpt2"
        else {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        }
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(
        family, vocab_size=37, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                assert "original_module" not in name


IDS = torch.arange(22).view(2, 11)


@each
def test_an_adapter_of_peft_loads_here_with_equal_outputs_and_gradients(family, options, tmp_path):
    theirs = peft.get_peft_model(base(family), peft.LoraConfig(**{"r": 4, **options}))
    randomise(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = PeftModel.from_pretrained(base(family), tmp_path, is_trainable=True)
    theirs.eval()
    wanted, found = theirs(IDS, labels=IDS), ours(IDS, labels=IDS)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    wanted.loss.backward()
    found.loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert set(trained) == {n for n, p in theirs_by_name.items() if p.requires_grad}
    for name, parameter in trained.items():
        torch.testing.assert_close(
            parameter.grad, theirs_by_name[name].grad, rtol=1e-4, atol=1e-6, msg=name
        )


@each
def test_our_adapter_loads_in_peft_with_equal_outputs(family, options, tmp_path):
    ours = get_peft_model(base(family), LoraConfig(**{"r": 4, **options}))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(family), tmp_path)
    with torch.no_grad():
        wanted = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
        merged = ours.merge_and_unload(safe_merge=True)
        assert not any("lora" in name for name, _ in merged.named_modules())
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_on_our_models_it_equals_the_peer_on_its_own(options, tmp_path):
    base("qwen2").save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base("qwen2"), peft.LoraConfig(**{"r": 4, **options}))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = topwork.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ours = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    theirs.eval()
    wanted, found = theirs(IDS, labels=IDS), ours(IDS, labels=IDS)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, by_name[name].grad, rtol=1e-4, atol=1e-6, msg=name
            )
