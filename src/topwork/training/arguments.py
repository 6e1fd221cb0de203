"""`TrainingArguments`: what a run may set, under the names that people know."""

from __future__ import annotations

import json
import os
from dataclasses import field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

from topwork.errors import ConfigError, nearest
from topwork.training.familiar import RUN, Familiar, familiar_of, settings
from topwork.training.optim import OPTIMISERS
from topwork.training.schedule import SCHEDULES

# Always told of a run.
TOLD = frozenset({
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed", "optim",
})  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "mlflow")
STRATEGIES = ("no", "steps", "epoch")


@settings
class TrainingArguments:
    """One run. Unknown names are refused with the nearest known one; see `familiar` for those of
    other libraries."""

    familiar: ClassVar[dict[str, Familiar]] = RUN

    output_dir: str = field(default="trainer_output", kw_only=False)
    num_train_epochs: float = 3.0
    max_steps: int = -1
    """Optimiser steps; above 0 it comes before `num_train_epochs`."""
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimiser step. The loss is normalised over all of them together."""
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    """On matrices alone: biases and norms are never decayed."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    optim: str = "adamw_torch_fused"
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0
    """Steps over which the learning rate rises; below 1 a share of all steps."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps; `warmup_steps` comes first."""
    bf16: bool | None = None
    """True: compute in bfloat16, with fp32 masters of what is trained; False: all in fp32; None:
    as the model was loaded."""
    model_init_kwargs: dict[str, Any] | None = None
    """What `from_pretrained` is given beside the model's name: revision, dtype,
    quantization_config …"""
    gradient_checkpointing: bool = False
    """Keep only each block's input for the backward pass: less memory, a third more time."""
    disable_dropout: bool = False
    """No dropout anywhere, the adapter's included."""
    seed: int = 42
    data_seed: int | None = None
    """Seed of the order of the rows; None: `seed`."""
    shuffle: bool = True
    logging_strategy: str = "steps"
    """When to log: "no", "steps" or "epoch"; the last step is logged in any case."""
    logging_steps: int = 10
    logging_first_step: bool = False
    eval_strategy: str = "no"
    """When to evaluate: "no", "steps" or "epoch"."""
    eval_steps: int | None = None
    """None: as `logging_steps`."""
    eval_on_start: bool = False
    save_strategy: str = "steps"
    """When to save: "no", "steps", "epoch", or "best": when `metric_for_best_model` is the best."""
    save_steps: int = 500
    save_total_limit: int | None = None
    """Checkpoints to keep; older ones go once the newest is verified."""
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "eval_loss"
    """With or without the prefix "eval_"."""
    greater_is_better: bool | None = None
    """None: yes, unless the metric's name ends with "loss"."""
    report_to: str | list[str] | None = "none"
    """Trackers beside log.jsonl and report.html: "tensorboard", "wandb", "mlflow", several, "all"
    that are installed, or "none"."""
    run_name: str | None = None
    sample_answers: int = 3
    """Held-out prompts that are answered at each evaluation, for report.html, where the rows of an
    objective have prompts."""
    disable_tqdm: bool = False
    """No progress bar."""
    use_cpu: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        at_least_one = (
            "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be a number from 0 on")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ConfigError("num_train_epochs must be positive when max_steps is not given")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio={self.warmup_ratio} must be in [0, 1]")
        if self.sample_answers < 0:
            raise ConfigError(f"sample_answers={self.sample_answers} must be at least 0")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ConfigError(f"save_total_limit={self.save_total_limit} must be at least 1")
        for name in ("logging_strategy", "eval_strategy"):
            _one_of(name, getattr(self, name), STRATEGIES)
        _one_of("save_strategy", self.save_strategy, (*STRATEGIES, "best"))
        if "8bit" in self.optim or self.optim.startswith("paged"):
            raise ConfigError(
                f"optim={self.optim!r}: moments are kept in fp32, for what is trained alone; use "
                "adamw_torch"
            )
        _one_of("optim", self.optim, OPTIMISERS)
        _one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        self.trackers()
        if self.load_best_model_at_end and "no" in (self.eval_strategy, self.save_strategy):
            raise ConfigError("load_best_model_at_end needs eval_strategy and save_strategy")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From a mapping (a YAML file, the command line)."""
        return cls(**values)

    def __getattr__(self, name: str) -> Any:
        familiar = familiar_of(type(self))
        if name in familiar:
            return familiar[name].default
        raise AttributeError(f"{type(self).__name__} has no {name!r}{nearest(name, dir(self))}")

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=_plain)

    @property
    def train_batch_size(self) -> int:
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size

    @property
    def world_size(self) -> int:
        """How many processes torchrun started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def process_index(self) -> int:
        return int(os.environ.get("RANK", "0"))

    def chosen(self) -> dict[str, Any]:
        """The fields that say what was set: those that are not at their defaults, and `TOLD`."""
        defaults = {f.name: f.default for f in fields(self)}
        return {
            name: value
            for name, value in self.to_dict().items()
            if name in TOLD or (value != defaults[name] and value not in ({}, []))
        }

    def trackers(self) -> tuple[str, ...]:
        """The trackers that `report_to` names. ConfigError for one that cannot be had."""
        given = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        if given in ([], ["none"]):
            return ()
        if given == ["all"]:
            return tuple(name for name in TRACKERS if find_spec(name))
        for name in given:
            if name not in TRACKERS:
                raise ConfigError(
                    f"report_to={name!r}{nearest(name, TRACKERS)}; one of none, all, "
                    f"{', '.join(TRACKERS)}. log.jsonl and report.html are always written; for "
                    "another tracker pass a callback with on_log"
                )
            if find_spec(name) is None:
                raise ConfigError(f"report_to={name!r}: pip install {name}, or report_to='none'")
        return tuple(given)

    def save(self, path: Path) -> None:
        path.write_text(self.to_json_string() + "\n", encoding="utf-8")

    def warmup(self, steps: int) -> int:
        """Steps of warm-up out of `steps`."""
        if self.warmup_steps:
            share = self.warmup_steps < 1
            return round(self.warmup_steps * steps) if share else int(self.warmup_steps)
        return round(self.warmup_ratio * steps)


def _plain(value: Any) -> Any:
    """What JSON has no form for: a configuration by its fields, a dtype by its name."""
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r}{nearest(str(value), choices)}; one of {', '.join(choices)}"
        )
