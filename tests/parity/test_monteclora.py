"""MonteCLoRA's draws against the peer's: the same numbers drawn, the same outputs and penalty."""

from __future__ import annotations

import pytest
import torch

import peft
import topwork
from parity.bases import IDS, base, close, randomise
from topwork.errors import ConfigError
from topwork.peft import LoraConfig, PeftModel, get_peft_model
from topwork.peft.methods._lora_monteclora import MonteClora

TARGETS = ["q_proj", "down_proj"]
DRAWS = {"num_samples": 3, "dirichlet_prior": 0.4, "sample_scaler": 0.3, "kl_loss_weight": 0.02}


def options(**more):
    return {"r": 4, "target_modules": TARGETS, "monteclora_config": {**DRAWS, **more}}


def pair(**more):
    theirs = peft.get_peft_model(base("qwen2"), peft.LoraConfig(**options(**more)))
    randomise(theirs)
    ours = get_peft_model(base("qwen2"), LoraConfig(**options(**more)))
    state = ours.state_dict()
    assert {k for k in state if "monteclora" in k} == {
        k for k in theirs.state_dict() if "monteclora" in k
    }
    ours.load_state_dict(theirs.state_dict())
    return ours.train(), theirs.train()


def same_draws(theirs, monkeypatch):
    """Let our layers draw what the peer's buffers will give, in the same places."""
    samplers = {
        n.removesuffix(".lora_monteclora_sampler.default"): m
        for n, m in theirs.named_modules() if n.endswith("sampler.default")
    }  # fmt: skip

    def draw(graft):
        sampler = next(m for n, m in samplers.items() if n.endswith(graft.path))
        found = sampler.sampler.buffer[0]
        return found["z_mvn"], found["z_wishart"].diag(), found["z_dirichlet"]

    monkeypatch.setattr(MonteClora, "draw", draw)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_passes_are_the_peers_with_the_penalty(entropy, checkpointing, monkeypatch):
    ours, theirs = pair(use_entropy=entropy)
    same_draws(theirs, monkeypatch)
    if checkpointing:
        ours.base_model.model.gradient_checkpointing_enable()
    found, wanted = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    penalty = theirs.base_model._get_monteclora_loss()
    assert penalty.abs() > 0.05
    close(found.logits, wanted.logits)
    close(found.loss, wanted.loss + penalty)
    found.loss.backward()
    (wanted.loss + penalty).backward()
    grads = dict(theirs.named_parameters())
    seen = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, grads[name].grad, msg=lambda m, n=name: f"{n}: {m}")
            seen += "prior" in name
    assert seen == 2 * 2 * 2
    for name, buffer in theirs.named_buffers():
        if "monteclora" in name:
            close(ours.get_buffer(name), buffer)


def test_the_variance_is_drawn_as_a_wishart_matrix_has_it_on_its_diagonal():
    ours, _ = pair()
    graft = next(m for m in ours.modules() if hasattr(m, "grafts")).grafts["default"]
    torch.manual_seed(0)
    drawn = torch.stack([graft.draw()[1] for _ in range(4000)])
    wishart = torch.distributions.Wishart(4.0, scale_tril=torch.eye(4))
    wanted = torch.stack([wishart.sample().diag() for _ in range(4000)])
    close(drawn.mean(0), wanted.mean(0), rtol=0.08, atol=0)
    close(drawn.std(0), wanted.std(0), rtol=0.12, atol=0)


def test_draws_differ_from_pass_to_pass_and_evaluating_has_none(tmp_path):
    ours, theirs = pair()
    assert not torch.equal(ours(IDS).logits, ours(IDS).logits)
    close(ours.eval()(IDS).logits, theirs.eval()(IDS).logits)
    ours.train()(IDS)
    ours.merge_adapter()  # without the draws, in training too
    close(ours(IDS).logits, theirs(IDS).logits)
    ours.unmerge_adapter()
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("qwen2"), tmp_path)
    for name, tensor in ours.adapter_state("default").items():
        assert torch.equal(again.adapter_state("default")[name], tensor)


def test_a_compiled_training_step_draws_afresh_and_has_the_penalty():
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = topwork.Config(
        model_type="qwen2", vocab_size=37, hidden_size=24, intermediate_size=40,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = topwork.AutoModelForCausalLM.from_config(config)
    ours = get_peft_model(model, LoraConfig(**options())).train()
    randomise(ours)
    run = torch.compile(lambda: ours(IDS, labels=IDS), backend="aot_eager", fullgraph=True)
    first, second = run().loss, run().loss
    assert first != second
    second.backward()
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_the_penalty_reaches_the_trainers_loss(tmp_path):
    losses = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        config = topwork.Config(
            model_type="qwen2", vocab_size=37, hidden_size=24, intermediate_size=40,
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = topwork.AutoModelForCausalLM.from_config(config)
        ours = get_peft_model(model, LoraConfig(**options(kl_loss_weight=weight)))
        rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
        args = topwork.TrainingArguments(
            output_dir=str(tmp_path / str(weight)), max_steps=1, logging_steps=1,
            per_device_train_batch_size=2, report_to="none", save_strategy="no",
        )  # fmt: skip
        trainer = topwork.Trainer(model=ours, args=args, train_dataset=rows)
        losses.append(trainer.train().training_loss)
    assert losses[1] > losses[0] + 1


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"dirichlet_prior": 0}, {"buffer_size": 0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoraConfig(monteclora_config=wrong)
    with pytest.raises(ConfigError, match="exclude each other"):
        LoraConfig(monteclora_config={}, use_dora=True)
