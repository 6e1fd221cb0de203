"""BEMA: the corrected mean against TRL's, the reference that is set to it, and checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

import tiny
from topwork import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BEMACallback,
    DPOConfig,
    DPOTrainer,
    LoraConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
)
from topwork.errors import ConfigError
from topwork.objectives.bema import trained
from topwork.objectives.reference import Reference

ROWS = [{"prompt": f"ask {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(4)]
VALUES = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1,
    "disable_tqdm": True, "save_strategy": "no", "shuffle": False,
}  # fmt: skip
FAST = {"update_freq": 1, "lag": 2}


def dpo(folder, lora, callbacks, **options):
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None
    return DPOTrainer(
        tiny.model(), None, DPOConfig(output_dir=str(folder), **{**VALUES, **options}), ROWS,
        processing_class=tiny.tokenizer(), peft_config=adapter, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("options", [
    {"update_freq": 2}, {"update_freq": 1, "update_after": 3, "lag": 3, "multiplier": 0.5},
    {"update_freq": 1, "min_ema_multiplier": 0.3, "bias_power": 0.9, "ema_power": 0.8},
], ids=str)  # fmt: skip
def test_the_corrected_mean_equals_the_peers(tmp_path, options):
    from trl.trainer.callbacks import BEMACallback as Peer

    tiny.model().save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    mine, peer = BEMACallback(**options), Peer(**options)
    for callback, model in ((mine, ours), (peer, theirs)):
        state = SimpleNamespace(global_step=0)
        callback.on_train_begin(None, state, None, model=model, trainer=None)
        for step in range(1, 8):
            torch.manual_seed(step)
            for _, parameter in sorted(model.named_parameters()):
                parameter.data += 0.1 * torch.randn(parameter.shape)
            state.global_step = step
            callback.on_step_end(None, state, None, model=model, trainer=None)
    wanted = dict(peer.running_model.named_parameters())
    assert set(mine.smooth) == set(wanted)
    for name, tensor in mine.smooth.items():
        torch.testing.assert_close(tensor, wanted[name].data)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_reference_is_set_to_it_every_few_steps(tmp_path, monkeypatch, lora):
    bema = BEMACallback(**FAST, update_ref_model=True, ref_model_update_freq=2)
    run = dpo(tmp_path, lora, [bema], max_steps=5)
    seen, take = [], Reference.take

    def noted(self, policy, values):
        take(self, policy, values)
        seen.append({k: t.clone() for k, t in values.items()})

    monkeypatch.setattr(Reference, "take", noted)
    run.train()
    assert len(seen) == 2  # after steps 2 and 4
    held = run.objective.reference._tensors(run.model, True)
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, seen[1][name])
    moved = [n for n in held if not torch.equal(seen[0][n], seen[1][n])]
    assert moved
    assert not any(torch.equal(trained(run.model)[n], held[n]) for n in moved)


def test_a_resumed_run_goes_on_with_mean_and_reference(tmp_path):
    def callbacks():
        return [BEMACallback(**FAST, update_ref_model=True, ref_model_update_freq=1)]

    whole = dpo(tmp_path / "a", True, callbacks(), save_strategy="steps", save_steps=2)
    whole.train()
    again = dpo(tmp_path / "b", True, callbacks())
    again.train(tmp_path / "a" / "checkpoint-2")
    one, two = (next(c for c in r.callbacks if isinstance(c, BEMACallback)) for r in (whole, again))
    assert one.tensors().keys() == two.tensors().keys()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name]), name
    said = [[e["loss"] for e in r.state.log_history if "loss" in e] for r in (whole, again)]
    assert said[0] == said[1]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_model_of_the_mean_lies_beside_the_run(tmp_path, lora):
    bema = BEMACallback(**FAST)
    run = SFTTrainer(
        tiny.model(), SFTConfig(output_dir=str(tmp_path), **VALUES), tiny.chats(4),
        processing_class=tiny.tokenizer(), callbacks=[bema],
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if lora else None,
    )  # fmt: skip
    run.train()
    last = {name: t.detach().clone() for name, t in trained(run.model).items()}
    if lora:
        found = trained(PeftModel.from_pretrained(tiny.model(), tmp_path / "bema"))
    else:
        found = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "bema"))
    assert AutoTokenizer.from_pretrained(tmp_path / "bema").eos_token == "<|im_end|>"
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.detach(), bema.smooth[name])
    assert any(not torch.equal(last[n], bema.smooth[n]) for n in last)


def test_a_reference_that_cannot_follow_is_refused(tmp_path):
    moving = BEMACallback(update_ref_model=True)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs cannot hold"):
        dpo(tmp_path, True, [moving], precompute_ref_log_probs=True)
    run = SFTTrainer(
        tiny.model(), SFTConfig(output_dir=str(tmp_path), **VALUES), tiny.chats(4),
        processing_class=tiny.tokenizer(), callbacks=[moving],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="needs a reference of its own"):
        run.train()
    with pytest.raises(ConfigError, match="update_freq=0"):
        BEMACallback(update_freq=0)
