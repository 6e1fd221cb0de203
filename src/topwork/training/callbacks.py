"""Callbacks: the events that people know, each with the arguments, the state and a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from topwork.errors import ConfigError
from topwork.training.arguments import TrainingArguments
from topwork.training.state import TrainerState

EVENTS = (
    "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end",
    "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log", "on_evaluate",
    "on_prediction_step", "on_predict", "on_save", "on_epoch_end", "on_train_end",
)  # fmt: skip


@dataclass
class TrainerControl:
    """What a callback may ask for; each is done once, after the event."""

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class TrainerCallback:
    """Override the events that matter. `more` holds model, logs, metrics, optimizer …

    One with `state_dict` and `load_state_dict` (of JSON's kinds), or with `tensors` and
    `load_tensors` ({name: tensor}), is part of checkpoints.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_substep_end(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_predict(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...
    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...


class AdamssAsaCallback(TrainerCallback):
    """Choose in each step which of AdaMSS's groups are trained (`use_asa`)."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        more["model"].update_and_allocate(state.global_step)


class EarlyStoppingCallback(TrainerCallback):
    """Stop when `metric_for_best_model` has not improved in so many evaluations."""

    def __init__(
        self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0
    ) -> None:
        self.patience = early_stopping_patience
        self.threshold = early_stopping_threshold
        self.best: float | None = None
        self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if args.eval_strategy == "no":
            raise ConfigError("EarlyStoppingCallback needs eval_strategy 'steps' or 'epoch'")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        value = more["metrics"].get(name)
        if value is None:
            raise ConfigError(
                f"metric_for_best_model={args.metric_for_best_model!r} is not among the metrics "
                f"{sorted(more['metrics'])}"
            )
        gain = None if self.best is None else value - self.best
        better = gain is None or (gain if args.greater_is_better else -gain) > self.threshold
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best = value
        if self.waited >= self.patience:
            control.should_training_stop = True
