"""What an adapter's method adds to the loss, in trainers that do not use the model's own call."""

from __future__ import annotations

import pytest
import torch

import tiny
from topwork import AdaLoraConfig, SFTConfig, SFTTrainer, get_peft_model


def first_loss(folder, weight, micro, steps):
    torch.manual_seed(0)
    config = AdaLoraConfig(
        target_modules="all-linear", init_r=4, total_step=100, orth_reg_weight=weight
    )
    model = get_peft_model(tiny.model(), config)
    penalty = model.penalty()
    args = SFTConfig(
        output_dir=str(folder), max_steps=1, logging_steps=1, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=micro, gradient_accumulation_steps=steps,
        learning_rate=0.1,
    )  # fmt: skip
    run = SFTTrainer(model, args, tiny.chats(4), processing_class=tiny.tokenizer())
    run.train()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return run.state.log_history[0]["loss"], float(penalty.detach()), trained


def test_it_joins_the_loss_once_a_step_however_the_step_is_cut(tmp_path):
    plain, nothing, still = first_loss(tmp_path / "plain", 0.0, 4, 1)
    whole, penalty, moved = first_loss(tmp_path / "whole", 0.5, 4, 1)
    cut, _, moved_too = first_loss(tmp_path / "cut", 0.5, 1, 4)
    assert nothing == 0 < penalty
    assert whole == pytest.approx(plain + penalty, rel=1e-5)
    assert cut == pytest.approx(whole, rel=1e-5)
    name = next(n for n in moved if "lora_A" in n)
    assert not torch.equal(moved[name], still[name])
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, moved_too[name], rtol=1e-3, atol=1e-3)
