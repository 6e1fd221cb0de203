"""Token classification: which words of a sentence are code, MiniLM with LoRA. A minute on 2 cores.

Data: sentences of real documentation whose authors put code in backticks; the marks are taken away
and are what is to be found. Files are held out whole. Metric: seqeval's F1 of whole entities.
"""

from __future__ import annotations

import random
import re

import torch
from docs import docs, minilm
from seqeval.metrics import f1_score, precision_score, recall_score

from topwork import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    LoraConfig,
    Trainer,
    TrainingArguments,
    get_peft_model,
)

TAGS = ["O", "B-CODE", "I-CODE"]
tokenizer = AutoTokenizer.from_pretrained(minilm())


def sentences(part, count):
    """(words, tags) of sentences with code in backticks."""
    found = []
    for doc in docs(part):
        for sentence in re.split(r"(?<=[.:])\s+|\n\n", doc.body):
            pieces = re.split(r"(?::\w+:)?``?([^`\n]+?)``?", " ".join(sentence.split()))
            if len(pieces) < 3 or not 40 < len(sentence) < 300 or "`" in "".join(pieces):
                continue
            words, tags = [], []
            for i, piece in enumerate(pieces):
                new = re.findall(r"\w+|[^\w\s]", piece)
                words += new
                tags += [2 if i % 2 else 0] * len(new)
                if i % 2 and new:
                    tags[-len(new)] = 1
            found.append((words, tags))
    random.Random(0).shuffle(found)
    return found[:count]


def rows(part, count):
    made = []
    for words, tags in sentences(part, count):
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=128)
        labels, last = [], None
        for word in encoded.word_ids():  # a word's first token stands for it
            labels.append(-100 if word is None or word == last else tags[word])
            last = word
        made.append({**encoded, "labels": labels})
    return made


def metrics(found):
    said = found.predictions.argmax(-1)
    kept = found.label_ids != -100
    wanted, given = (
        [[TAGS[t] for t in row[keep]] for row, keep in zip(table, kept)]
        for table in (found.label_ids, said)
    )
    scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: score(wanted, given, zero_division=0) for name, score in scores.items()}


torch.manual_seed(0)
model = AutoModelForTokenClassification.from_pretrained(
    minilm(), id2label=dict(enumerate(TAGS)), label2id={t: i for i, t in enumerate(TAGS)}
)
model = get_peft_model(
    model, LoraConfig(task_type="TOKEN_CLS", r=16, lora_alpha=32, target_modules="all-linear")
)
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="code", num_train_epochs=3, per_device_train_batch_size=16, learning_rate=1e-3,
        warmup_steps=0.1, save_strategy="no", logging_steps=50, disable_dropout=True,
    ),
    train_dataset=rows("train", 800),
    eval_dataset=rows("held_out", 300),
    processing_class=tokenizer,
    compute_metrics=metrics,
)  # fmt: skip
trainer.train()
after = trainer.evaluate()
trainer.save_model()
print("entities found: " + ", ".join(f"{k} {after['eval_' + k]:.3f}" for k in
                                     ("f1", "precision", "recall")))  # fmt: skip
