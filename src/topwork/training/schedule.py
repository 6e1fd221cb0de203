"""Learning-rate schedules: the factor at a step as a plain function, so nothing needs saving."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from topwork.errors import ConfigError, nearest

Schedule = Callable[[int], float | None]
"""A step (from 0) → factor on the learning rate; None: the optimiser's rates are set already."""


def _linear(progress: float, steps: int) -> float:
    return 1 - progress


def _cosine(progress: float, steps: int, num_cycles: float = 0.5) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * 2 * num_cycles * progress)))


def _restarts(progress: float, steps: int, num_cycles: int = 1) -> float:
    if progress >= 1:
        return 0.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def _min_cosine(
    progress: float, steps: int, min_lr_rate: float = 0.1, num_cycles: float = 0.5
) -> float:
    wave = 0.5 * (1 + math.cos(math.pi * 2 * num_cycles * progress))
    return max(0.0, wave * (1 - min_lr_rate) + min_lr_rate)


def _polynomial(progress: float, steps: int, power: float = 1.0, lr_end: float = 0.0) -> float:
    """`lr_end` is a share of the learning rate."""
    return lr_end + (1 - lr_end) * (1 - progress) ** power


def _constant(progress: float, steps: int) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "cosine_with_min_lr": _min_cosine,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _constant,
    "warmup_stable_decay": _constant,
}


def schedule(kind: str, steps: int, warmup: int, **options: Any) -> Callable[[int], float]:
    """step (from 0) → factor on the learning rate: a linear rise over `warmup`, then `kind`."""
    shape = SCHEDULES[kind]

    def factor(step: int) -> float:
        if kind != "constant" and step < warmup:
            return step / max(1, warmup)
        if kind == "inverse_sqrt":
            scale = options.get("timescale") or warmup or 10_000
            return 1 / math.sqrt((step - warmup + scale) / scale)
        if kind == "warmup_stable_decay":
            return _stable_decay(step, steps, **options)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return shape(progress, steps, **options)

    try:
        factor(warmup)
    except TypeError as error:
        raise ConfigError(f"lr_scheduler_kwargs={options} do not fit {kind!r}: {error}") from error
    return factor


def _stable_decay(
    step: int, steps: int, num_decay_steps: int | None = None, min_lr_ratio: float = 0.0
) -> float:
    """Constant, then a cosine fall over the last `num_decay_steps` (a tenth of all)."""
    falling = num_decay_steps if num_decay_steps is not None else max(1, steps // 10)
    progress = min(1.0, max(0, step - (steps - falling)) / max(1, falling))
    wave = 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - min_lr_ratio) * wave + min_lr_ratio


class Given:
    """A torch scheduler as a schedule: stepped once after each of the optimiser's steps."""

    def __init__(self, scheduler: LRScheduler) -> None:
        if not isinstance(scheduler, LRScheduler) or hasattr(scheduler, "num_bad_epochs"):
            raise ConfigError(
                f"{type(scheduler).__name__} is no scheduler that goes by steps alone; use one of "
                "torch.optim.lr_scheduler that needs no metric"
            )
        self.inner, self.at = scheduler, 0

    def __call__(self, step: int) -> None:
        with warnings.catch_warnings():
            # A resumed run goes to its step without taking those before it.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            while self.at < step:
                self.inner.step()
                self.at += 1


def get_scheduler(
    name: str, optimizer: Optimizer, num_warmup_steps: int = 0, num_training_steps: int = 0,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LambdaLR:  # fmt: skip
    """A torch scheduler for a loop of one's own, in one of the shapes of `lr_scheduler_type`."""
    if name not in SCHEDULES:
        raise ConfigError(
            f"there is no schedule {name!r}{nearest(name, SCHEDULES)}; there are "
            f"{', '.join(SCHEDULES)}"
        )
    options = scheduler_specific_kwargs or {}
    return LambdaLR(optimizer, schedule(name, num_training_steps, num_warmup_steps, **options))


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int
) -> LambdaLR:
    return get_scheduler("linear", optimizer, num_warmup_steps, num_training_steps)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5
) -> LambdaLR:
    options = {"num_cycles": num_cycles}
    return get_scheduler("cosine", optimizer, num_warmup_steps, num_training_steps, options)


def get_constant_schedule(optimizer: Optimizer) -> LambdaLR:
    return get_scheduler("constant", optimizer)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int) -> LambdaLR:
    return get_scheduler("constant_with_warmup", optimizer, num_warmup_steps)
