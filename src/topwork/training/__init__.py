"""One trainer for every objective."""

from topwork.training.arguments import TrainingArguments
from topwork.training.callbacks import (
    AdamssAsaCallback,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
)
from topwork.training.checkpoint import get_last_checkpoint
from topwork.training.objective import Loss, Objective
from topwork.training.results import TrainOutput
from topwork.training.schedule import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_scheduler,
)
from topwork.training.state import TrainerState, set_seed
from topwork.training.trainer import Trainer

__all__ = [
    "AdamssAsaCallback",
    "EarlyStoppingCallback",
    "Loss",
    "Objective",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_last_checkpoint",
    "get_linear_schedule_with_warmup",
    "get_scheduler",
    "set_seed",
]
