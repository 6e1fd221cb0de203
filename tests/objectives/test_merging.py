"""The trained model merged with another one: formulas, folders, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from topwork import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LoraConfig,
    MergeConfig,
    MergeModelCallback,
    SFTConfig,
    SFTTrainer,
)
from topwork.errors import ConfigError, TopworkError
from topwork.objectives.merging import arc

VALUES = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1,
    "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


def sft(folder, callback, lora=False, model=None, **options):
    torch.manual_seed(1)
    return SFTTrainer(
        model or tiny.model(), SFTConfig(output_dir=str(folder), **{**VALUES, **options}),
        tiny.chats(4), processing_class=tiny.tokenizer(), callbacks=[callback],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None,
    )  # fmt: skip


def test_each_way_follows_its_formula():
    p, t, b = torch.tensor([3.0, -4.0, 1.0, 0.0]), torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.ones(4)
    line = MergeConfig("linear", policy_model_weight=3.0, target_model_weight=1.0)
    torch.testing.assert_close(line.of(p, t, None), (3 * p + t) / 4)
    # Changes p - b = [2, -5, 0, -1], t - b = [3, 2, 1, 0]; half of each is kept.
    ties = MergeConfig("ties", "other", density=0.5).of(p, t, b)  # the signs +, -, +, +
    torch.testing.assert_close(ties, b + torch.tensor([2.5, -5.0, 0.0, 0.0]))
    pruned = MergeConfig("magnitude_prune", "other", density=0.5).of(p, t, b)
    torch.testing.assert_close(pruned, b + torch.tensor([5.0, -3.0, 0.0, 0.0]))
    whole = MergeConfig("dare_linear", "other", density=1.0, target_model_weight=0.5).of(p, t, b)
    torch.testing.assert_close(whole, b + (p - b) + 0.5 * (t - b))


def test_an_arc_has_its_ends_its_middle_and_its_plane():
    one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for t, wanted in ((0.0, one), (1.0, other), (0.5, torch.full((1, 2), math.sqrt(2)))):
        torch.testing.assert_close(arc(one, other, t), wanted)
    third = arc(one, other, 1 / 3)
    torch.testing.assert_close(third, 2 * torch.tensor([[math.sqrt(3) / 2, 0.5]]))
    torch.testing.assert_close(arc(one, 3 * one, 0.5), 2 * one)  # the line
    assert torch.equal(arc(torch.zeros(2), other[0], 0.5), other[0] / 2)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_mean_with_the_start_lies_beside_the_run(tmp_path, lora):
    run = sft(tmp_path, MergeModelCallback(), lora)
    run.train()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    after = run.model.merge_and_unload() if lora else run.model
    start = tiny.model().state_dict()
    moved = 0
    for name, tensor in after.state_dict().items():
        torch.testing.assert_close(found[name], (tensor + start[name]) / 2)
        moved += not torch.equal(tensor, start[name])
    assert moved >= 4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|im_end|>"


def test_each_checkpoint_holds_its_own_merge_with_another_model(tmp_path):
    tiny.model(3).save_pretrained(tmp_path / "other")
    config = MergeConfig("slerp", tmp_path / "other", t_values=0.3, dtype="bfloat16")
    run = sft(tmp_path / "run", MergeModelCallback(config, True), save_strategy="steps",
              save_steps=1)  # fmt: skip
    run.train()
    other = tiny.model(3).state_dict()
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        own = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        found = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="bfloat16")
        for name, tensor in found.state_dict().items():
            wanted = arc(own[name], other[name], 0.3).to(torch.bfloat16)
            assert torch.equal(tensor, wanted), name
    assert not (tmp_path / "run" / "merged").exists()


def test_a_resumed_run_of_an_adapter_still_has_its_start(tmp_path):
    sft(tmp_path, MergeModelCallback(), True, save_strategy="steps", save_steps=1).train()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    sft(tmp_path, MergeModelCallback(), True).train(tmp_path / "checkpoint-1")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_what_cannot_be_merged_is_refused_before_the_run(tmp_path):
    tiny.model(vocab_size=300).save_pretrained(tmp_path / "larger")
    for config, error, words in (
        (MergeConfig("ties"), ConfigError, "name another target_model_path"),
        (MergeConfig(density=1.5), ConfigError, "density=1.5"),
        (MergeConfig(dtype="float17"), ConfigError, "none of torch's"),
        (MergeConfig(policy_model_weight=-0.5), ConfigError, "sum of both weights"),
        (MergeConfig(target_model_path=tmp_path / "none"), TopworkError, "none"),
        (MergeConfig("linear", tmp_path / "larger"), ConfigError, "vocab_size is 300"),
    ):
        with pytest.raises(error, match=words):
            sft(tmp_path / "run", MergeModelCallback(config)).train()
    with pytest.raises(ConfigError, match="nearest: 'slerp'"):
        MergeConfig("slurp")
    with pytest.raises(ConfigError, match="upload the folder"):
        MergeModelCallback(push_to_hub=True)
    run = sft(tmp_path / "full", MergeModelCallback(), save_strategy="steps", save_steps=1)
    run.train()
    with pytest.raises(ConfigError, match="no longer has the model that training began from"):
        sft(tmp_path / "full", MergeModelCallback()).train(tmp_path / "full" / "checkpoint-1")
