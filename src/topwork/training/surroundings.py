"""What surrounds a run: its callbacks, its processes, and where its results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topwork import hub
from topwork.training import files, saving
from topwork.training.arguments import TrainingArguments
from topwork.training.callbacks import TrainerCallback, TrainerControl
from topwork.training.distributed import World
from topwork.training.progress import Show
from topwork.training.report import Facts, add_run
from topwork.training.results import lines_of, save_metrics
from topwork.training.state import TrainerState


@dataclass(frozen=True)
class Processes:
    """What scripts ask of an accelerator: who this process is, and to speak for all."""

    world: World
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        return self.world.is_main

    @property
    def is_local_main_process(self) -> bool:
        return self.world.is_main

    @property
    def process_index(self) -> int:
        return self.world.rank

    @property
    def num_processes(self) -> int:
        return self.world.size

    def print(self, *words: Any) -> None:
        if self.world.is_main:
            print(*words)

    def wait_for_everyone(self) -> None:
        self.world.wait()

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model


class Surroundings:
    """The part of a trainer that does not depend on how it trains."""

    args: TrainingArguments
    world: World
    device: torch.device
    model: nn.Module
    tokenizer: Any
    state: TrainerState
    control: TrainerControl
    callbacks: list[TrainerCallback]
    optimizer: torch.optim.Optimizer | None = None
    _facts: Facts | None = None

    # -- callbacks -------------------------------------------------------------------------------

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Take out this callback, or all of this class."""
        self.callbacks = [
            c for c in self.callbacks if c is not callback and type(c) is not callback
        ]

    def _add_callbacks(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = []
        for callback in callbacks:
            self.add_callback(callback)
        self._fire("on_init_end")

    def _fire(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(
                self.args, self.state, self.control, model=self.model, optimizer=self.optimizer,
                processing_class=self.tokenizer, trainer=self, **more,
            )  # fmt: skip

    # -- processes -------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Processes:
        return Processes(self.world, self.device)

    def is_world_process_zero(self) -> bool:
        return self.world.is_main

    is_local_process_zero = is_world_process_zero

    # -- results ---------------------------------------------------------------------------------

    @property
    def processing_class(self) -> Any:
        """The tokenizer or processor that is saved with the model."""
        return self.tokenizer

    @property
    def _home(self) -> Path:
        return Path(self.args.output_dir)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """The model (or its adapters) and the tokenizer, ready to use."""
        folder = Path(output_dir or self._home)
        if self.world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            files.save_model(self.model, folder, self.tokenizer)
            if self._facts is not None and self.state.log_history:
                add_run(folder, self.state, self._facts)
        self.world.wait()

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Show the metrics of a split ("train", "eval", "test")."""
        Show(0, 0, not self.world.is_main).lines(lines_of(split, metrics))

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write SPLIT_results.json into output_dir, and add to all_results.json."""
        if self.world.is_main:
            save_metrics(self._home, split, metrics, combined)

    def save_state(self) -> None:
        """Write trainer_state.json into output_dir."""
        if self.world.is_main:
            self._home.mkdir(parents=True, exist_ok=True)
            saving.kept_state(self).save(self._home)

    def push_to_hub(
        self, commit_message: str = "End of training", repo_id: str | None = None, **card: Any
    ) -> str:
        """Put model and tokenizer into a repository of the Hub; the commit's address.

        `repo_id`: by default `args.hub_model_id`, else the name of output_dir. `card`: what other
        libraries write on the model's card; ours says what the run did.
        """
        args = self.args
        return hub.upload(
            self.save_model,
            repo_id or args.hub_model_id or self._home.name,
            token=args.hub_token,
            private=args.hub_private_repo,
            commit_message=commit_message,
        )
