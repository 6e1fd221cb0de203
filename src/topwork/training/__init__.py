"""One trainer for every objective."""

from topwork.training.arguments import TrainingArguments
from topwork.training.callbacks import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
)
from topwork.training.objective import Loss, Objective
from topwork.training.state import TrainerState
from topwork.training.trainer import Trainer, TrainOutput

__all__ = [
    "EarlyStoppingCallback",
    "Loss",
    "Objective",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
]
