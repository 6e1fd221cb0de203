"""Adapters on any torch module."""

from topwork.peft.config import LoraConfig
from topwork.peft.model import PeftModel, get_peft_model

__all__ = ["LoraConfig", "PeftModel", "get_peft_model"]
