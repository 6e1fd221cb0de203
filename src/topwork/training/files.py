"""A model's files in a checkpoint, and back into the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from topwork.errors import CheckpointError

TRAINED = "trained.safetensors"


def save_model(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write the model (or its adapters) and the tokenizer into `folder`."""
    save = getattr(model, "save_pretrained", None)
    if save is not None:
        save(folder)
    else:
        save_file(trained_tensors(model), folder / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, under its name in memory: trainable parameters and buffers."""
    state = model.state_dict(keep_vars=True)
    return {
        name: value.detach().contiguous().clone()
        for name, value in state.items()
        if not isinstance(value, nn.Parameter) or value.requires_grad
    }


def save_trained(model: nn.Module, folder: Path) -> None:
    """The exact tensors that a resumed run takes up."""
    save_file(trained_tensors(model), folder / TRAINED)


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Put them back. CheckpointError when they are of another model or adapter."""
    given = load_file(folder / TRAINED)
    here = {k: v for k, v in model.state_dict(keep_vars=True).items() if k in given}
    wanted = set(trained_tensors(model))
    if set(given) != wanted:
        strange = sorted(set(given) ^ wanted)
        raise CheckpointError(f"{folder}: was made by another model or adapter: {strange[:5]}")
    for name, tensor in given.items():
        if here[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} is {list(tensor.shape)} there, {list(here[name].shape)} here"
            )
        here[name].copy_(tensor)
