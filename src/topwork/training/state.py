"""Where a run stands, and the random streams, as JSON and tensors."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from topwork.errors import CheckpointError

STATE, RNG = "trainer_state.json", "rng.safetensors"


@dataclass
class TrainerState:
    """Steps done and what was seen; names as in transformers' `trainer_state.json`."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    micro_step: int = 0
    """Micro-batches of the next step whose gradients are summed already."""
    num_input_tokens_seen: int = 0
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    data: str = ""
    """Fingerprint of the training data."""
    pending: dict[str, Any] = field(default_factory=dict)
    """Sums since the last log."""
    loss_sum: float = 0.0
    """The losses of all steps that were logged, summed."""
    num_train_epochs: int = 0
    train_batch_size: int = 0
    logging_steps: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    total_flos: float = 0.0
    """Not counted."""
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True
    callbacks: dict[str, Any] = field(default_factory=dict)
    """What callbacks with `state_dict` want kept."""

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / STATE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrainerState:
        try:
            return cls(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / STATE}: {error}") from error


def begun(data: str, steps: int, per_epoch: int, args: Any, world: Any) -> TrainerState:
    """The state of a run of `steps` steps, `per_epoch` of them an epoch, before its first."""
    return TrainerState(
        max_steps=steps, data=data, num_train_epochs=-(-steps // per_epoch),
        train_batch_size=args.train_batch_size, logging_steps=args.logging_steps,
        eval_steps=args.eval_steps, save_steps=args.save_steps,
        is_world_process_zero=world.is_main, is_local_process_zero=world.is_main,
    )  # fmt: skip


def set_seed(seed: int) -> None:
    """Start torch's, numpy's and Python's generators from `seed`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_rng(folder: Path) -> None:
    """The states of torch's, numpy's and Python's generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, spare = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    rest = {
        "numpy": [kind, int(position), int(has_gauss), float(gauss)],
        "python": [version, spare],
    }
    save_file(tensors, folder / RNG, metadata={"rest": json.dumps(rest)})


def load_rng(folder: Path) -> None:
    """Set all generators as `save_rng` found them."""
    from safetensors import safe_open

    tensors = load_file(folder / RNG)
    with safe_open(folder / RNG, framework="pt") as file:
        rest = json.loads(file.metadata()["rest"])
    torch.set_rng_state(tensors["torch"])
    kind, position, has_gauss, gauss = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss,
                         gauss))  # fmt: skip
    version, spare = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), spare))
    if torch.cuda.is_available():
        states = [tensors[f"cuda.{i}"] for i in range(torch.cuda.device_count())
                  if f"cuda.{i}" in tensors]  # fmt: skip
        torch.cuda.set_rng_state_all(states)
