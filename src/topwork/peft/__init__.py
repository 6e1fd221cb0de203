"""Adapters on any torch module."""

from topwork.peft.config import PeftConfig, TaskType
from topwork.peft.methods.ia3 import IA3Config
from topwork.peft.methods.lora import LoraConfig
from topwork.peft.model import PeftModel, get_peft_model

__all__ = ["IA3Config", "LoraConfig", "PeftConfig", "PeftModel", "TaskType", "get_peft_model"]
