"""A reward model from SmolLM2-135M: held-out accuracy against chance. Minutes on 2 cores."""

from __future__ import annotations

import time

import nouns
import torch

from topwork import AutoModelForSequenceClassification, LoraConfig, RewardConfig, RewardTrainer

started = time.perf_counter()
torch.manual_seed(0)
trainer = RewardTrainer(
    AutoModelForSequenceClassification.from_pretrained(
        nouns.MODEL, dtype="bfloat16", num_labels=1
    ),
    args=RewardConfig(
        output_dir="reward", num_train_epochs=1, per_device_train_batch_size=12,
        learning_rate=5e-4, lr_scheduler_type="cosine", warmup_steps=0.1, save_strategy="no",
        center_rewards_coefficient=0.01,
    ),
    train_dataset=nouns.pairs("train", 900),
    eval_dataset=nouns.pairs("held_out"),
    processing_class=nouns.tokenizer(),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)  # fmt: skip
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model()
print(
    f"held-out pairs ranked rightly: {before['eval_accuracy']:.1%} before, "
    f"{after['eval_accuracy']:.1%} after, margin {after['eval_margin']:.2f}; "
    f"{time.perf_counter() - started:.0f} s"
)
