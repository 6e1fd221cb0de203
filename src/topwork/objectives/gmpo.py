"""GMPO (arXiv:2507.20673): GRPO by the geometric mean of an answer's ratios, each one clipped.

One token of an unlikely ratio moves such a mean little, so the clip can be wide.
"""

from __future__ import annotations

from typing import ClassVar

from topwork.objectives.grpo import GRPOConfig, GRPOTrainer
from topwork.training.familiar import settings


@settings
class GMPOConfig(GRPOConfig):
    """A run of GMPO: GRPO with its loss and its authors' constants."""

    loss_type: str = "gmpo"
    epsilon: float = 0.4
    use_bias_correction_kl: bool = False


class GMPOTrainer(GRPOTrainer):
    """The trainer with the GRPO objective and GMPO's loss; arguments as GRPOTrainer's."""

    config_class: ClassVar[type[GRPOConfig]] = GMPOConfig


__all__ = ["GMPOConfig", "GMPOTrainer"]
