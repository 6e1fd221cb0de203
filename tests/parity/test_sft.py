"""Our SFT run against TRL's: the same losses and gradient norms, step by step."""

from __future__ import annotations

import pytest
import torch
import transformers
import trl
from datasets import Dataset

import tiny
from peft import PeftModel as TheirModel
from topwork import LoraConfig, PeftModel, SFTConfig, SFTTrainer
from topwork.peft import get_peft_model

ROWS = [
    {"prompt": f"add {i} {'x' * (i % 4)}", "completion": f" {i} is {'yes' * (1 + i % 3)}"}
    for i in range(8)
]


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (2, 4)])
def test_losses_equal_the_peer(tmp_path, loss_type, micro, accumulation, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    start = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():  # B as well, so that every gradient is there from the first step
        for name, parameter in start.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    start.save_pretrained(tmp_path / "adapter")
    common = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "lr_scheduler_type": "cosine",
        "warmup_steps": 1, "max_grad_norm": 0.5, "seed": 0, "loss_type": loss_type,
    }  # fmt: skip
    ours = SFTTrainer(
        PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True),
        SFTConfig(output_dir=str(tmp_path / "ours"), disable_tqdm=True, save_strategy="no",
                  token_metrics=True, **common),
        ROWS, processing_class=tokenizer,
    )  # fmt: skip
    ours.train()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peer = trl.SFTTrainer(
        TheirModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True),
        trl.SFTConfig(
            output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **common,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "base"),
    )  # fmt: skip
    peer.train()
    keys = ("loss", "grad_norm", "learning_rate")
    if accumulation == 1:  # the peer takes the mean of the micro-batches' means
        keys = (*keys, "entropy", "mean_token_accuracy")
    for key in keys:
        found = [e[key] for e in ours.state.log_history if key in e]
        wanted = [float(e[key]) for e in peer.state.log_history if key in e]
        assert found == pytest.approx(wanted, rel=1e-4), key
