"""Where a run's figures go besides log.jsonl: TensorBoard, Weights & Biases, MLflow (`report_to`).

Names are those that people's dashboards know: `train/loss`, `eval/loss`, by optimiser step.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topwork.training.arguments import TrainingArguments
from topwork.training.callbacks import TrainerCallback

NOT_FIGURES = frozenset({"step", "epoch"})


def figures(logs: dict[str, Any]) -> dict[str, float]:
    """The numbers of one log entry by what they measure: `eval_loss` is `eval/loss`."""
    named: dict[str, float] = {}
    for name, value in logs.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name in NOT_FIGURES:
            continue
        kind, _, rest = name.partition("_")
        held = kind in ("eval", "test") and rest
        named[f"{kind}/{rest}" if held else f"train/{name}"] = float(value)
    if "epoch" in logs:
        named["train/epoch"] = float(logs["epoch"])
    return named


class TensorBoard(TrainerCallback):
    """Event files in `output_dir/runs/RUN`."""

    def __init__(self) -> None:
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(args.output_dir) / "runs" / (args.run_name or "run")
        self.writer = SummaryWriter(str(folder))
        lines = [f"    {name}: {value}" for name, value in args.chosen().items()]
        self.writer.add_text("args", "\n".join(lines), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.writer is not None:
            for name, value in figures(more["logs"]).items():
                self.writer.add_scalar(name, value, state.global_step)
            self.writer.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.writer.close()
        self.writer = None


class WandB(TrainerCallback):
    """A run of Weights & Biases: the one that is open, or a new one in project $WANDB_PROJECT."""

    def __init__(self) -> None:
        self.opened: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        wandb = importlib.import_module("wandb")
        if wandb.run is None:
            project = os.environ.get("WANDB_PROJECT", "topwork")
            self.opened = wandb.init(project=project, name=args.run_name, dir=args.output_dir)
        wandb.config.update({k: str(v) for k, v in args.chosen().items()}, allow_val_change=True)
        wandb.define_metric("train/global_step")
        wandb.define_metric("*", step_metric="train/global_step")

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        wandb = importlib.import_module("wandb")
        if wandb.run is not None:
            wandb.log({**figures(more["logs"]), "train/global_step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.opened is not None:
            self.opened.finish()
            self.opened = None


class MLflow(TrainerCallback):
    """A run of MLflow: the one that is open, or a new one."""

    def __init__(self) -> None:
        self.opened = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        mlflow = importlib.import_module("mlflow")
        if mlflow.active_run() is None:
            mlflow.start_run(run_name=args.run_name)
            self.opened = True
        mlflow.log_params({k: str(v)[:500] for k, v in args.chosen().items()})

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        mlflow = importlib.import_module("mlflow")
        if mlflow.active_run() is not None:
            mlflow.log_metrics(figures(more["logs"]), step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.opened:
            importlib.import_module("mlflow").end_run()
            self.opened = False


KINDS: dict[str, Callable[[], TrainerCallback]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow,
}  # fmt: skip


def trackers(args: TrainingArguments, is_main: bool) -> list[TrainerCallback]:
    """The callbacks of `report_to`, on the first process alone."""
    return [KINDS[name]() for name in args.trackers() if is_main]
