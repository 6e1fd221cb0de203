"""Post-training algorithms: each says what it accepts, how it becomes a batch, and its loss."""

from topwork.objectives.dpo import DPO, DPOConfig, DPOTrainer
from topwork.objectives.sft import SFT, SFTConfig, SFTTrainer

__all__ = ["DPO", "SFT", "DPOConfig", "DPOTrainer", "SFTConfig", "SFTTrainer"]
