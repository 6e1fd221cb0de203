"""Multitask prompt tuning (arXiv:2303.02861): shared virtual tokens, times a low-rank matrix of
each task."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from topwork.errors import CheckpointError, ConfigError
from topwork.peft.config import at_least
from topwork.peft.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig

SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


class MultitaskPromptTuningInit(StrEnum):
    """Where the virtual tokens start: as in prompt tuning, or from those of source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Virtual tokens ⊙ (columns · rows) of the row's task, which `task_ids` [B] names."""

    num_ranks: int | None = 1
    num_tasks: int | None = 1
    prompt_tuning_init_state_dict_path: str | None = None
    """An adapter_model.safetensors to start from, with prompt_tuning_init "AVERAGE_SOURCE_TASKS",
    "EXACT_SOURCE_TASK" or "ONLY_SOURCE_SHARED"."""
    prompt_tuning_init_task: int | None = 0
    """The task of "EXACT_SOURCE_TASK"."""
    peft_type: str = "MULTITASK_PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_ranks", self.num_ranks or 0, 1)
        at_least("num_tasks", self.num_tasks or 0, 1)
        if self.prompt_tuning_init in SOURCES and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} needs "
                "prompt_tuning_init_state_dict_path"
            )

    def inits(self) -> tuple[str, ...]:
        return ("RANDOM", "TEXT", *SOURCES)

    @property
    def tasks(self) -> int | None:
        return self.num_tasks


class MultitaskPrompt(PromptEmbedding):
    config: MultitaskPromptTuningConfig

    def __init__(self, config: MultitaskPromptTuningConfig, words: nn.Module) -> None:
        super().__init__(config, words)
        tasks, ranks = config.num_tasks or 1, config.num_ranks or 1
        count, width = self.embedding.weight.shape
        self.prefix_task_cols = nn.Parameter(torch.randn(tasks, count, ranks) * 0.02)
        self.prefix_task_rows = nn.Parameter(torch.randn(tasks, ranks, width) * 0.02)
        if config.prompt_tuning_init in SOURCES and not config.inference_mode:
            self._from_source(Path(str(config.prompt_tuning_init_state_dict_path)))

    @torch.no_grad()
    def _from_source(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: only .safetensors files are read")
        given, how = load_file(path), self.config.prompt_tuning_init
        self.embedding.weight.copy_(given["prompt_embeddings"])
        for name in ("prefix_task_cols", "prefix_task_rows"):
            if how == "AVERAGE_SOURCE_TASKS":
                getattr(self, name).copy_(given[name].mean(0, keepdim=True))
            elif how == "EXACT_SOURCE_TASK":
                getattr(self, name).copy_(given[name][self.config.prompt_tuning_init_task or 0])

    def forward(self, batch: int, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None or len(task_ids) not in (1, batch):
            raise ConfigError(
                f"MULTITASK_PROMPT_TUNING needs task_ids, one for each of {batch} rows or for all"
            )
        task_ids = task_ids.expand(batch).to(self.embedding.weight.device)
        task = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        return self.embedding.weight * task

    def saved(self) -> dict[str, Tensor]:
        tasks = {n: getattr(self, n) for n in ("prefix_task_cols", "prefix_task_rows")}
        return {**super().saved(), **tasks}

    @torch.no_grad()
    def load(self, given: dict[str, Tensor], source: str) -> None:
        for name in ("prefix_task_cols", "prefix_task_rows"):
            own, tensor = getattr(self, name), given.pop(name, None)
            if tensor is None or tensor.shape != own.shape:
                raise CheckpointError(f"{source}: {name} {list(own.shape)} is missing or differs")
            own.copy_(tensor)
        super().load(given, source)


CONFIG = MultitaskPromptTuningConfig
PROMPT = MultitaskPrompt
