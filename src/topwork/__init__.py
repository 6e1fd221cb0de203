"""Topwork: load, adapt, train and talk to open models on small hardware."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from topwork._version import __version__

if TYPE_CHECKING:
    from topwork.generation import GenerationConfig
    from topwork.models import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        Config,
        describe,
    )
    from topwork.peft import (
        IA3Config,
        LoraConfig,
        PeftConfig,
        PeftModel,
        TaskType,
        get_peft_model,
    )
    from topwork.text import Tokenizer
    from topwork.text import Tokenizer as AutoTokenizer

# Public name -> its module. Read on first use, so that `import topwork` loads no torch.
_HOMES = {
    "AutoConfig": "topwork.models",
    "AutoModel": "topwork.models",
    "AutoModelForCausalLM": "topwork.models",
    "AutoModelForSequenceClassification": "topwork.models",
    "AutoModelForTokenClassification": "topwork.models",
    "AutoTokenizer": "topwork.text",
    "Config": "topwork.models",
    "GenerationConfig": "topwork.generation",
    "IA3Config": "topwork.peft",
    "LoraConfig": "topwork.peft",
    "PeftConfig": "topwork.peft",
    "PeftModel": "topwork.peft",
    "TaskType": "topwork.peft",
    "Tokenizer": "topwork.text",
    "describe": "topwork.models",
    "get_peft_model": "topwork.peft",
}

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "Config",
    "GenerationConfig",
    "IA3Config",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "Tokenizer",
    "__version__",
    "describe",
    "get_peft_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'topwork' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
