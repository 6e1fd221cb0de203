"""Adapters that are swapped in, and calls of models that are not ours."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from topwork.errors import ConfigError
from topwork.peft import (
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    check_if_peft_model,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))


def tuned():
    return get_peft_model(net(), LoraConfig(target_modules=["0", "2"], init_lora_weights=False))


def convs():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 1, groups=2))


def test_padded_adapters_compute_the_same_and_take_others_of_any_smaller_rank(tmp_path):
    pictures = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    wanted = []
    for rank in (4, 6):
        torch.manual_seed(rank)
        config = LoraConfig(target_modules=["0", "1"], r=rank, init_lora_weights=False)
        model = get_peft_model(convs(), config)
        model.save_pretrained(tmp_path / str(rank))
        wanted.append(model(pictures))
    model = PeftModel.from_pretrained(convs(), tmp_path / "4")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = [id(p) for p in model.parameters()]
    torch.testing.assert_close(model(pictures), wanted[0])
    for rank, output in ((6, wanted[1]), (4, wanted[0])):
        hotswap_adapter(model, tmp_path / str(rank), "default")
        torch.testing.assert_close(model(pictures), output)
    assert [id(p) for p in model.parameters()] == before
    with pytest.raises(ConfigError, match="more than 3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    with pytest.raises(ConfigError, match="before it is compiled"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=8)
    plain = tuned()
    plain.save_pretrained(tmp_path / "plain")
    plain.merge_adapter()
    with pytest.raises(ConfigError, match="is merged"):
        hotswap_adapter(plain, tmp_path / "plain", "default")


def peers_llama():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "initializer_range": 0.3, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


IDS = torch.arange(1, 9).view(2, 4)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_rows_that_generate_multiplies_keep_their_adapter(how):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(peers_llama(), config).eval()
    call = {"input_ids": IDS, "max_new_tokens": 4, **how}
    torch.manual_seed(0)
    wanted = model.generate(**call)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**call, adapter_names=["default"] * 2), wanted)
    torch.manual_seed(0)
    mixed = model.generate(**call, adapter_names=["__base__", "default"])
    assert mixed.shape == wanted.shape
    if "num_beams" in how:
        with model.disable_adapter():
            alone = model.generate(**call)
        assert torch.equal(mixed, torch.stack([alone[0], wanted[1]]))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_leave_the_scores_of_generate(kind):
    model = get_peft_model(peers_llama(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    call = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
    told = model.generate(**call, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(told.sequences, model.generate(**call))
    assert len(told.scores) == 4


def test_reentrant_checkpointing_of_transformers_trains_adapters():
    base = peers_llama()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_factors_are_combined_by_the_verbs_defaults():
    config = IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    model = get_peft_model(net(), config)
    model.add_adapter("other", config)
    for layer in (model.base_model.model[0],):
        nn.init.normal_(layer.ia3_l["default"])
        nn.init.normal_(layer.ia3_l["other"])
    model.add_weighted_adapter(["default", "other"], [0.5, -1.5], "both")
    torch.testing.assert_close(
        layer.ia3_l["both"], 0.5 * layer.ia3_l["default"] - 1.5 * layer.ia3_l["other"]
    )


def test_a_folder_is_known_for_an_adapter(tmp_path):
    assert not check_if_peft_model(tmp_path)
    tuned().save_pretrained(tmp_path)
    assert check_if_peft_model(tmp_path)


def test_one_task_stands_for_all_rows():
    config = MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM")
    model = get_peft_model(peers_llama(), config).eval()
    nn.init.normal_(model.prompt_encoder["default"].prefix_task_cols)
    one = model(IDS, task_ids=torch.tensor([1])).logits
    assert torch.equal(one, model(IDS, task_ids=torch.tensor([1, 1])).logits)
    assert not torch.allclose(one, model(IDS, task_ids=torch.tensor([0, 1])).logits)
    with pytest.raises(ConfigError, match="one for each of 2 rows or for all"):
        model(IDS, task_ids=torch.tensor([1, 1, 1]))
