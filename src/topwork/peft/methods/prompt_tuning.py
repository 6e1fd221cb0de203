"""Prompt tuning (arXiv:2104.08691): the embeddings of virtual tokens are trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from topwork.errors import ConfigError
from topwork.peft.config import one_of
from topwork.peft.prompts import Prompt, PromptLearningConfig

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


class PromptTuningInit(StrEnum):
    """Where the virtual tokens start; see `prompt_tuning_init`."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """`num_virtual_tokens` embeddings before the input."""

    prompt_tuning_init: str = "RANDOM"
    """"RANDOM": normal; "SAMPLE_VOCAB": of random words; "TEXT": of `prompt_tuning_init_text`."""
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    """For `Tokenizer.from_pretrained`: revision, token …"""
    peft_type: str = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = str(
            getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        )
        one_of("prompt_tuning_init", self.prompt_tuning_init, self.inits())
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if getattr(self, name) is None:
                    raise ConfigError(f"prompt_tuning_init='TEXT' needs {name}")

    def inits(self) -> tuple[str, ...]:
        return INITS


class PromptEmbedding(Prompt):
    """Embeddings, started at random or at those of words."""

    def __init__(self, config: PromptTuningConfig, words: nn.Module) -> None:
        super().__init__(config, words)
        ids = None if config.inference_mode else self._words(config, words)
        if ids is not None:
            with torch.no_grad():
                device = next(words.parameters()).device
                self.embedding.weight.copy_(words(torch.tensor(ids, device=device)))

    def _words(self, config: PromptTuningConfig, words: Any) -> list[int] | None:
        count = self.count(config)
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            return torch.randint(0, words.num_embeddings, (count,)).tolist()
        if config.prompt_tuning_init != "TEXT":
            return None
        from topwork.text import Tokenizer

        kwargs = config.tokenizer_kwargs or {}
        tokenizer = Tokenizer.from_pretrained(str(config.tokenizer_name_or_path), **kwargs)
        ids = tokenizer(str(config.prompt_tuning_init_text))["input_ids"]
        if not ids:
            raise ConfigError("prompt_tuning_init_text has no tokens")
        return (ids * -(-count // len(ids)))[:count]


CONFIG = PromptTuningConfig
PROMPT = PromptEmbedding
