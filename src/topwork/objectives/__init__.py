"""Post-training algorithms: each says what it accepts, how it becomes a batch, and its loss."""

from topwork.objectives.dpo import DPO, DPOConfig, DPOTrainer
from topwork.objectives.grpo import GRPO, GRPOConfig, GRPOTrainer
from topwork.objectives.rloo import RLOOConfig, RLOOTrainer
from topwork.objectives.sft import SFT, SFTConfig, SFTTrainer

__all__ = [
    "DPO",
    "GRPO",
    "SFT",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "SFTConfig",
    "SFTTrainer",
]
