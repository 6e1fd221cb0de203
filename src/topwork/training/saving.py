"""What a checkpoint of a run holds, and a run taken up from one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from topwork.errors import CheckpointError
from topwork.training import checkpoint as checkpoints
from topwork.training import files
from topwork.training.objective import held_state, take_up
from topwork.training.state import TrainerState, load_rng, save_rng

OPTIMISER, GRADIENTS = "optimizer.safetensors", "gradients.safetensors"
OBJECTIVE, CALLBACKS = "objective.safetensors", "callbacks.safetensors"


def write(trainer: Any, folder: Path) -> None:
    """All of `trainer`'s run as it stands, gradients of an open step included."""
    files.save_model(trainer.model, folder, trainer.tokenizer)
    files.save_trained(trainer.model, folder)
    optimiser = trainer.optimiser
    save_file({k: v.contiguous() for k, v in optimiser.state().items()}, folder / OPTIMISER)
    if gradients := optimiser.gradients():
        save_file({k: v.contiguous() for k, v in gradients.items()}, folder / GRADIENTS)
    if held := held_state(trainer.objective):
        save_file({k: v.contiguous() for k, v in held.items()}, folder / OBJECTIVE)
    kept = {f"{i}.{name}": t for i, c in enumerate(trainer.callbacks) if hasattr(c, "tensors")
            for name, t in c.tensors().items()}  # fmt: skip
    if kept:
        save_file({name: t.contiguous() for name, t in kept.items()}, folder / CALLBACKS)
    save_rng(folder)
    trainer.args.save(folder / "training_args.json")
    kept_state(trainer).save(folder)


def kept_state(trainer: Any) -> TrainerState:
    """The run's state with what its callbacks want kept."""
    kept = {
        f"{i}.{type(c).__name__}": c.state_dict()
        for i, c in enumerate(trainer.callbacks)
        if hasattr(c, "state_dict")
    }
    return TrainerState(**{**asdict(trainer.state), "callbacks": kept})


def chosen_checkpoint(home: Path, given: bool | str | Path | None) -> Path | None:
    """The checkpoint to resume from: the newest whole one (True), a given one, or none."""
    if given is None or given is False:
        return None
    if given is True:
        folder = checkpoints.latest(home)
        if folder is None:
            raise CheckpointError(f"{home}: there is no checkpoint to resume from")
        return folder
    checkpoints.verify(Path(given))
    return Path(given)


def resume(trainer: Any, folder: Path) -> None:
    """Take up the run that `write` put into `folder`."""
    saved, fresh = TrainerState.load(folder), trainer.state
    if saved.data != fresh.data:
        raise CheckpointError(
            f"{folder}: was trained on other data (or other settings of it) than given now; "
            "to go on with new data start a run from its model"
        )
    saved.max_steps, saved.num_train_epochs = fresh.max_steps, fresh.num_train_epochs
    trainer.state = saved
    files.load_trained(trainer.model, folder)
    trainer.optimiser.load(load_file(folder / OPTIMISER))
    if (folder / GRADIENTS).exists():
        trainer.optimiser.set_gradients(load_file(folder / GRADIENTS))
    if (folder / OBJECTIVE).exists():
        take_up(trainer.objective, load_file(folder / OBJECTIVE))
    tensors = load_file(folder / CALLBACKS) if (folder / CALLBACKS).exists() else {}
    for i, callback in enumerate(trainer.callbacks):
        own = {k.removeprefix(f"{i}."): t for k, t in tensors.items() if k.startswith(f"{i}.")}
        if own and hasattr(callback, "load_tensors"):
            callback.load_tensors(own)
        kept = saved.callbacks.get(f"{i}.{type(callback).__name__}")
        if kept is not None:
            callback.load_state_dict(kept)
    load_rng(folder)
