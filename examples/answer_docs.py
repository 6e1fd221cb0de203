"""Extractive question answering over real documentation, MiniLM with LoRA. A minute or two.

A passage is the parameters of a function as NumPy or scikit-learn document them, a question asks
for one of them, and the answer is its description. Files are held out whole. Metric: exact match
and F1 as SQuAD has them.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from docs import docs, minilm, parameters
from torchmetrics.functional.text import squad

from topwork import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    LoraConfig,
    Trainer,
    TrainingArguments,
    get_peft_model,
)

tokenizer = AutoTokenizer.from_pretrained(minilm())
ASKED = ("What is {}?", "What does {} mean?", "What is {} for?", "Explain {}.")


def examples(part, count):
    """(question, passage, where the answer starts, answer)."""
    draw, found = random.Random(0), []
    for doc in docs(part):
        entries = [(n, text.partition(". ")[0]) for n, text in parameters(doc)]
        entries = [(n, text) for n, text in entries if 15 < len(text) < 160]
        if len(entries) < 3:
            continue
        draw.shuffle(entries)
        passage = ""
        starts = []
        for name, text in entries[:6]:
            passage += f"{name}: "
            starts.append(len(passage))
            passage += f"{text}. "
        for i in draw.sample(range(len(starts)), 2):
            name, text = entries[i]
            found.append((draw.choice(ASKED).format(name), passage, starts[i], text))
    draw.shuffle(found)
    return found[:count]


def row(question, passage, start, answer):
    encoded = tokenizer(
        question, passage, truncation="only_second", max_length=256, return_offsets_mapping=True
    )
    offsets, types = encoded["offset_mapping"], encoded["token_type_ids"]
    inside = [
        i for i, ((a, b), t) in enumerate(zip(offsets, types))
        if t == 1 and a >= start and b <= start + len(answer) and b > a
    ]  # fmt: skip
    ends = (inside[0], inside[-1]) if inside else (0, 0)
    return {**encoded, "start_positions": ends[0], "end_positions": ends[1]}


def metrics(found):
    """Of each passage the likeliest span, as text, against the answer."""
    said, wanted = [], []
    for i, (starts, ends) in enumerate(zip(*found.predictions)):
        _, passage, at, answer = HELD_OUT[i]
        spans, types = TEST[i]["offset_mapping"], TEST[i]["token_type_ids"]
        size = len(spans)
        score = starts[:size, None] + ends[None, :size]
        allowed = np.triu(np.ones((size, size))) - np.triu(np.ones((size, size)), 60)
        allowed *= np.outer(types, types)
        first, last = np.unravel_index(np.where(allowed > 0, score, -1e9).argmax(), score.shape)
        said.append({"id": str(i), "prediction_text": passage[spans[first][0] : spans[last][1]]})
        wanted.append({"id": str(i), "answers": {"text": [answer], "answer_start": [at]}})
    return {k: float(v) for k, v in squad(said, wanted).items()}


HELD_OUT = examples("held_out", 200)
TEST = [row(*example) for example in HELD_OUT]
torch.manual_seed(0)
model = get_peft_model(
    AutoModelForQuestionAnswering.from_pretrained(minilm()),
    LoraConfig(task_type="QUESTION_ANS", r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="answers", num_train_epochs=2, per_device_train_batch_size=8,
        learning_rate=1e-3, warmup_steps=0.1, save_strategy="no", logging_steps=50,
        disable_dropout=True,
    ),
    train_dataset=[row(*example) for example in examples("train", 600)],
    eval_dataset=TEST,
    processing_class=tokenizer,
    compute_metrics=metrics,
)  # fmt: skip
trainer.train()
after = trainer.evaluate()
trainer.save_model()
print(f"exact match {after['eval_exact_match']:.1f}, F1 {after['eval_f1']:.1f}")
