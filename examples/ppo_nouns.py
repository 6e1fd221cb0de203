"""PPO on a verifiable reward: SmolLM2-135M and a value head beside it learn to name categories.

As `grpo_nouns.py`, but each answer is compared with what the critic expected of it, not with other
answers to the same prompt. Some minutes on 2 cores:

    python examples/ppo_nouns.py [output folder]
"""

from __future__ import annotations

import sys

from grpo_nouns import brief, right

from topwork import AutoModelForCausalLM, AutoTokenizer, LoraConfig, PPOConfig, PPOTrainer
from topwork.cli.demo import accuracy, answers, chat, find_model, read


def main(output: str = "ppo_nouns") -> None:
    name = find_model()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(name)
    held_out = read("held_out")
    before = accuracy(answers(model, tokenizer, held_out), held_out)
    rows = [{"prompt": chat(r, answered=False), "category": r["category"]} for r in read("train")]
    trainer = PPOTrainer(
        model,
        [right, brief],
        PPOConfig(
            output_dir=output, max_steps=160, per_device_train_batch_size=32,
            gradient_accumulation_steps=2, num_generations=8, num_mini_batches=2,
            num_ppo_epochs=2, max_completion_length=12, learning_rate=2e-4, warmup_steps=5,
            kl_coef=0.0, reward_weights=[1.0, 0.2], missing_eos_penalty=0.2,
            lr_scheduler_type="constant_with_warmup", logging_steps=8, save_strategy="no",
        ),
        rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    after = accuracy(answers(trainer.policy, tokenizer, held_out), held_out)
    print(f"held-out accuracy: {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    main(*sys.argv[1:])
