"""Post-training algorithms: each says what it accepts, how it becomes a batch, and its loss."""

from topwork.objectives.sft import SFT, SFTConfig, SFTTrainer

__all__ = ["SFT", "SFTConfig", "SFTTrainer"]
