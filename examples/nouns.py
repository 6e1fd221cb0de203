"""What the examples share: SmolLM2-135M, and pairs of answers made from WordNet nouns.

A pair: which category a noun belongs to, answered rightly (chosen) and wrongly (rejected). 1,800
nouns to train on, 300 others to measure with, both from `topwork demo`.
"""

from __future__ import annotations

import random

import torch

from topwork import AutoTokenizer
from topwork.cli.demo import CATEGORIES, chat, find_model, read
from topwork.objectives.answers import collect, halves
from topwork.objectives.logprobs import token_logprobs

MODEL = find_model()


def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def pairs(part: str, count: int | None = None) -> list[dict]:
    """Rows with prompt, chosen and rejected: of "train" or "held_out"."""
    draw = random.Random(0)
    rows = []
    for row in read(part)[:count]:
        wrong = draw.choice([c for c in CATEGORIES if c != row["category"]])
        answers = ({"role": "assistant", "content": c} for c in (row["category"], wrong))
        chosen, rejected = ([a] for a in answers)
        rows.append({"prompt": chat(row, answered=False), "chosen": chosen, "rejected": rejected})
    return rows


@torch.no_grad()
def preferred(model, samples, size: int = 25) -> float:
    """Share of pairs whose chosen answer the model finds likelier, token by token."""
    right = 0.0
    for at in range(0, len(samples), size):
        batch = collect(model, samples[at : at + size])
        chosen, rejected = halves(batch.sums(token_logprobs(model, batch.batch)) / batch.counts())
        right += float((chosen > rejected).sum())
    return right / len(samples)
