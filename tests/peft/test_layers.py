"""What layers show of their adapters, and what is told of adapters that may not be meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from topwork import AutoModelForCausalLM, Config
from topwork.errors import ConfigError, TopworkWarning
from topwork.peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))


def tuned(**options):
    torch.manual_seed(1)
    settings = {"target_modules": ["0", "2"], "r": 2, "init_lora_weights": False, **options}
    return get_peft_model(net(), LoraConfig(**settings))


def test_what_is_set_of_a_layers_adapters_is_set_in_them():
    model = tuned(target_modules=["0"])
    layer = model.base_model.model[0]
    changed = model(X) - net()(X)
    layer.scaling = dict.fromkeys(layer.scaling, 0.0)
    torch.testing.assert_close(model(X), net()(X))
    assert changed.abs().max() > 1e-2
    with pytest.raises(ConfigError, match="follows from"):
        layer.use_dora = {"default": True}


def test_the_base_makes_room_for_the_words_of_an_adapters_file(tmp_path):
    base = AutoModelForCausalLM.from_config(
        Config(
            model_type="llama", vocab_size=31, hidden_size=16, intermediate_size=24,
            num_hidden_layers=1, num_attention_heads=2,
        )
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(34)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 33]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_a_layer_that_joins_has_the_active_adapters_of_the_others():
    model = tuned(target_modules=["0"])
    model.add_adapter("other", LoraConfig(target_modules=["2"], modules_to_save=["1"]))
    assert [layer.active_adapters for layer in model.get_layer_status()] == [["default"]] * 3
    assert model.get_model_status().active_adapters == ["default"]
    torch.testing.assert_close(model(X), tuned(target_modules=["0"])(X))


def test_a_layers_adapters_are_scaled():
    model = tuned(target_modules=["2"], lora_alpha=6)
    layer, bare = model.base_model.model[2], net()(X)
    change = model(X) - bare
    layer.scale_layer(2.0)
    layer.scale_layer(1.5)
    torch.testing.assert_close(model(X) - bare, 3 * change)
    layer.unscale_layer(3.0)
    torch.testing.assert_close(model(X) - bare, change)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(model(X) - bare, 0.5 * change)
    layer.unscale_layer()
    assert dict(layer.scaling) == {"default": 3.0}


def test_patterns_that_find_no_target_are_told():
    with pytest.warns(TopworkWarning, match=r"rank_pattern: 'lin' finds none"):
        tuned(rank_pattern={"lin": 3, "2": 1})


def test_a_model_that_has_adapters_already_is_told():
    model = tuned()
    with pytest.warns(TopworkWarning, match="has adapters already"):
        get_peft_model(model.get_base_model(), LoraConfig(target_modules=["0"]))
