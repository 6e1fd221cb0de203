"""A model's files in a checkpoint, and back into the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from topwork.errors import CheckpointError

TRAINED = "trained.safetensors"
HELD = "held by the model's files"


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
    """The exact tensors that a resumed run takes up: those that the model's files in `folder` lack,
    and where the others stand in them."""
    tensors = trained_tensors(model)
    held = _held(tensors, folder)
    rest = {name: t for name, t in tensors.items() if name not in held}
    save_file(rest, folder / TRAINED, metadata={HELD: json.dumps(held, sort_keys=True)})


def _held(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, tuple[str, str]]:
    """Which of `tensors` stand bit by bit in the files of `folder`, whatever their names there:
    name → (file, name in it)."""
    kinds = {(t.dtype, t.shape) for t in tensors.values()}
    places: dict[Any, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(key)
                if (tensor.dtype, tensor.shape) in kinds:
                    places.setdefault(_content(tensor), (path.name, key))
    found = ((name, places.get(_content(t))) for name, t in tensors.items())
    return {name: place for name, place in found if place is not None}


def _content(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What two tensors share that are the same bit by bit."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, hashlib.sha256(plain.numpy().data).digest()


def read_trained(folder: Path) -> dict[str, torch.Tensor]:
    """What `save_trained` was given, by name in memory."""
    given = load_file(folder / TRAINED)
    with safe_open(folder / TRAINED, framework="pt") as file:
        held = json.loads((file.metadata() or {}).get(HELD, "{}"))
    for home in sorted({home for home, _ in held.values()}):
        with safe_open(folder / home, framework="pt") as file:
            given |= {n: file.get_tensor(key) for n, (h, key) in held.items() if h == home}
    return given


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Put them back. CheckpointError when they are of another model or adapter."""
    given = read_trained(folder)
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
