"""A tuned SmolLM2-135M teaches an untuned one in 4 bits. Minutes on 2 cores."""

from __future__ import annotations

import time

import nouns

from topwork import (
    AutoModelForCausalLM,
    DistillationConfig,
    DistillationTrainer,
    LoraConfig,
    SFTConfig,
    SFTTrainer,
)
from topwork.cli.demo import chat, read
from topwork.data.answers import prepare_answers
from topwork.data.preferences import PAIRS
from topwork.data.prepare import Marking

started = time.perf_counter()
tokenizer = nouns.tokenizer()
rows = [{"messages": chat(row)} for row in read("train")[:600]]
held_out = prepare_answers(nouns.pairs("held_out"), tokenizer, Marking(), PAIRS).samples
common = {
    "num_train_epochs": 1, "per_device_train_batch_size": 12, "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1, "save_strategy": "no",
}  # fmt: skip
lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

teaching = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(nouns.MODEL, dtype="bfloat16"),
    SFTConfig(output_dir="teacher", learning_rate=1e-3, **common),
    rows, processing_class=tokenizer, peft_config=LoraConfig(**lora),
)  # fmt: skip
teaching.train()
teacher = teaching.model.merge_and_unload()

student = AutoModelForCausalLM.from_pretrained(
    nouns.MODEL, dtype="bfloat16",
    quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
)  # fmt: skip
before = nouns.preferred(student, held_out)
trainer = DistillationTrainer(
    student, teacher,
    DistillationConfig(output_dir="student", learning_rate=1e-3, beta=0.0, **common),
    rows, processing_class=tokenizer, peft_config=LoraConfig(**lora),
)  # fmt: skip
trainer.train()
trainer.save_model()
print(
    f"held-out pairs whose right answer is likelier: teacher "
    f"{nouns.preferred(teacher, held_out):.1%}, student in 4 bits {before:.1%} before, "
    f"{nouns.preferred(trainer.model, held_out):.1%} after; {time.perf_counter() - started:.0f} s"
)
