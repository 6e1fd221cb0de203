"""Tiny models, tokenizers and rows that many tests share."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from topwork import AutoModelForCausalLM, Config
from topwork.text import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None = CHATML) -> Tokenizer:
    """Bytes as tokens, ChatML markers, <|im_end|> as the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*SPECIAL, *alphabet])}
    core = Core(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = Tokenizer(
        core,
        {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": template},
    )
    made.add_tokens(SPECIAL, special=True)
    return made


MERGES = [("a", "b"), ("ab", "ab"), ("c", "c"), ("s", "a"), ("sa", "y")]


def other_tokenizer() -> Tokenizer:
    """The tiny tokenizer with merges, in another order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    pieces = [*SPECIAL, *alphabet, *("".join(m) for m in MERGES)]
    core = Core(models.BPE(vocab={t: i for i, t in enumerate(pieces)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = Tokenizer(
        core, {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": CHATML}
    )
    made.add_tokens(SPECIAL, special=True)
    return made


def model(seed: int = 0, **changes):
    """A two-layer Llama over the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    values = {
        "model_type": "llama", "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 256, "initializer_range": 0.3, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(Config(**{**values, **changes}))


def chat(*turns: str) -> dict:
    """Messages that alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def chats(count: int) -> list[dict]:
    """Different short chats of different lengths."""
    return [
        chat(f"say {i}", "ab" * (1 + i % 5), "and?", f"{i} {'c' * (i % 3)}") for i in range(count)
    ]
