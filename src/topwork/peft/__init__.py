"""Adapters on any torch module."""

from topwork.peft.config import PeftConfig, TaskType
from topwork.peft.methods.adalora import AdaLoraConfig
from topwork.peft.methods.beft import BeftConfig
from topwork.peft.methods.boft import BOFTConfig
from topwork.peft.methods.c3a import C3AConfig
from topwork.peft.methods.delora import DeloraConfig
from topwork.peft.methods.fourierft import FourierFTConfig
from topwork.peft.methods.hira import HiraConfig
from topwork.peft.methods.hra import HRAConfig
from topwork.peft.methods.ia3 import IA3Config
from topwork.peft.methods.ln_tuning import LNTuningConfig
from topwork.peft.methods.loha import LoHaConfig
from topwork.peft.methods.lokr import LoKrConfig
from topwork.peft.methods.lora import LoraConfig
from topwork.peft.methods.miss import MissConfig
from topwork.peft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from topwork.peft.methods.oft import OFTConfig
from topwork.peft.methods.p_tuning import PromptEncoderConfig
from topwork.peft.methods.prefix_tuning import PrefixTuningConfig
from topwork.peft.methods.prompt_tuning import PromptTuningConfig
from topwork.peft.methods.randlora import RandLoraConfig
from topwork.peft.methods.road import RoadConfig
from topwork.peft.methods.shira import ShiraConfig
from topwork.peft.methods.trainable_tokens import TrainableTokensConfig
from topwork.peft.methods.vblora import VBLoRAConfig
from topwork.peft.methods.vera import VeraConfig
from topwork.peft.model import PeftModel, get_peft_model

__all__ = [
    "AdaLoraConfig",
    "BOFTConfig",
    "BeftConfig",
    "C3AConfig",
    "DeloraConfig",
    "FourierFTConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "TaskType",
    "TrainableTokensConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "get_peft_model",
]
