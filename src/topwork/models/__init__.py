"""Models: one decoder, declared families, the Auto classes."""

from topwork.models.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    describe,
)
from topwork.models.base import CausalLMOutput, CausalModel, Model
from topwork.models.config import Config

__all__ = [
    "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "CausalLMOutput", "CausalModel", "Config", "Model",
    "describe",
]  # fmt: skip
