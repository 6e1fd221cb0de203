"""GRPO on a verifiable reward: SmolLM2-135M learns to answer with the right category, in one word.

No answer is shown to it; it learns which of its own answers earn more. Some minutes on 2 cores:

    python examples/grpo_nouns.py [output folder]
"""

from __future__ import annotations

import sys

from topwork import AutoModelForCausalLM, AutoTokenizer, GRPOConfig, GRPOTrainer, LoraConfig
from topwork.cli.demo import CATEGORIES, accuracy, answers, chat, find_model, named, read


def right(completions, category, **_):
    """1 for an answer that names the category before any other."""
    return [float(named(c[0]["content"]) == k) for c, k in zip(completions, category)]


def brief(completions, **_):
    """0.5 for an answer that is one of the categories and nothing else."""
    return [0.5 * (c[0]["content"].strip() in CATEGORIES) for c in completions]


def main(output: str = "grpo_nouns") -> None:
    name = find_model()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(name)
    held_out = read("held_out")
    before = accuracy(answers(model, tokenizer, held_out), held_out)
    rows = [{"prompt": chat(r, answered=False), "category": r["category"]} for r in read("train")]
    trainer = GRPOTrainer(
        model,
        [right, brief],
        GRPOConfig(
            output_dir=output, max_steps=120, per_device_train_batch_size=64, num_generations=8,
            max_completion_length=12, learning_rate=2e-4, warmup_steps=5, beta=0.0,
            reward_weights=[1.0, 0.2], missing_eos_penalty=0.2, scale_rewards="none",
            lr_scheduler_type="constant_with_warmup", logging_steps=10, save_strategy="no",
        ),
        rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    after = accuracy(answers(trainer.model, tokenizer, held_out), held_out)
    print(f"held-out accuracy: {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    main(*sys.argv[1:])
