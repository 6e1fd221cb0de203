from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from topwork import AutoModelForCausalLM, Config
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

IDS = torch.arange(10)[None]


def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Config(
            model_type="llama", vocab_size=31, hidden_size=16, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        )
    )  # fmt: skip


def tuned(seed=1, **options):
    model = get_peft_model(base(), LoraConfig(**{"target_modules": "all-linear", **options}))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_fresh_adapter_changes_nothing_and_trains_under_its_share():
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], r=1))
    assert torch.equal(logits(model), logits(base()))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * (16 + 16)
    assert total == base().num_parameters() + trainable


def test_disabled_merged_and_unmerged_agree():
    model = tuned()
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, logits(base()), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.unload()), logits(base()), rtol=1e-4, atol=1e-4)


def test_several_adapters_are_kept_chosen_and_removed(tmp_path):
    first, second = tuned(1), tuned(2, r=3)
    second.save_pretrained(tmp_path)
    wanted = [logits(first), logits(second)]
    first.load_adapter(tmp_path, "other")
    assert torch.equal(logits(first), wanted[0])
    first.set_adapter("other")
    torch.testing.assert_close(logits(first), wanted[1])
    assert all("other" in n for n, p in first.named_parameters() if p.requires_grad)
    first.set_adapter(["default", "other"])
    assert not torch.allclose(logits(first), wanted[1], atol=1e-2)
    first.delete_adapter("other")
    assert torch.equal(logits(first), wanted[0])
    with pytest.raises(ConfigError, match="nearest: 'default'"):
        first.set_adapter("defualt")
    first.delete_adapter("default")
    assert (first.active_adapters, first.peft_config) == ([], {})
    assert torch.equal(logits(first), logits(base()))


def test_it_attaches_to_any_module():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=2))
    model(torch.randn(3, 4)).sum().backward()
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(grads) == 4
    assert all("lora" in n for n in grads)


def test_a_bf16_base_keeps_fp32_masters():
    model = get_peft_model(base().to(torch.bfloat16), LoraConfig(target_modules="all-linear"))
    out = model(IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)


def test_dropout_acts_in_training_alone():
    model = tuned(lora_dropout=0.5).train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_prj"]}, "CausalDecoder; nearest: 'q_proj'"),
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no"),
        ({"target_modules": r"x\..*"}, "matches no"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leave none"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "nearest: 'lm_head'"),
        ({"r": 0}, "r=0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"bias": "some"}, "bias='some'"),
        ({"init_lora_weights": "pisa"}, "nearest: 'pissa'"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        get_peft_model(base(), LoraConfig(**options))


def test_options_of_the_file_that_are_not_acted_on_are_refused():
    with pytest.raises(ConfigError, match="a_later_option="):
        LoraConfig.from_dict({"r": 4, "a_later_option": {"x": 4}})
    with pytest.raises(ConfigError, match="not a LoraConfig"):
        LoraConfig.from_dict({"peft_type": "IA3"})
    with pytest.raises(ConfigError, match="'LORRA' is not supported; nearest: 'LORA'"):
        PeftConfig.from_dict({"peft_type": "LORRA"})


def test_a_file_that_does_not_fit_lists_its_tensors(tmp_path):
    tuned(target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(CheckpointError, match=r"missing: .*v_proj\.lora_A\.weight"):
        PeftModel.from_pretrained(base(), tmp_path)
    file.write_text(json.dumps({**values, "r": 5}))
    with pytest.raises(CheckpointError, match="wrong shape"):
        PeftModel.from_pretrained(base(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="adapter_model"):
        PeftModel.from_pretrained(base(), tmp_path)
