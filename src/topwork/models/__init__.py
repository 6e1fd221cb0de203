"""Models: one decoder, declared families, the Auto classes."""

from topwork.models.auto import AutoConfig, AutoModelForCausalLM, describe
from topwork.models.base import CausalLMOutput, CausalModel
from topwork.models.config import Config

__all__ = [
    "AutoConfig", "AutoModelForCausalLM", "CausalLMOutput", "CausalModel", "Config", "describe",
]  # fmt: skip
