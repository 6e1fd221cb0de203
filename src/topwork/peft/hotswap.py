"""Another adapter's numbers in the parameters of one that is there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.peft import inject, state
from topwork.peft.config import PeftConfig
from topwork.peft.methods.lora import Lora
from topwork.peft.model import PeftModel


def padded(matrix: Tensor, axis: int, size: int, groups: int = 1) -> Tensor:
    """`matrix` with zeros behind it along `axis` up to `size`, in each of `groups` parts."""
    parts = matrix.unflatten(axis, (groups, -1))
    shape = [*parts.shape]
    shape[axis + 1] = size // groups
    made = parts.new_zeros(shape)
    made.narrow(axis + 1, 0, parts.shape[axis + 1]).copy_(parts)
    return made.flatten(axis, axis + 1)


def _ranks(model: nn.Module, name: str) -> dict[int, tuple[int, int]]:
    """The matrices of a LoRA adapter, by identity: (the axis of the rank, groups along it)."""
    found = {}
    for graft in inject.grafts_of(model, name):
        if isinstance(graft, Lora):
            a, b = (graft.parameter(matrix) for matrix in graft.names)
            found |= {id(a): (0, graft.site.groups), id(b): (1, 1)}
    return found


@torch.no_grad()
def hotswap_adapter(
    model: PeftModel, model_name_or_path: str | Path, adapter_name: str, **where: Any
) -> None:
    """Put another adapter's tensors into the parameters of `adapter_name`, which stay the same
    objects. LoRA of a smaller rank fits; for a larger one they grow, and a compiled model compiles
    anew. Layers that the other does not target get no change.
    """
    folder = hub.resolve(model_name_or_path, want=("adapter",), **where).folder
    new: Any = PeftConfig.from_pretrained(folder)
    old: Any = model.peft_config[adapter_name]
    for field in ("peft_type", "use_dora", "lora_bias"):
        if getattr(new, field, None) != getattr(old, field, None):
            raise ConfigError(
                f"{folder} has {field}={getattr(new, field, None)!r}, the adapter "
                f"{getattr(old, field, None)!r}: it cannot be swapped in"
            )
    if old.peft_type not in ("LORA", "IA3"):
        raise ConfigError(f"adapters of {old.peft_type} cannot be swapped; load it beside this one")
    if any(adapter_name in layer.merged_adapters for layer in inject.layers_of(model)):
        raise ConfigError(f"{adapter_name!r} is merged; unmerge_adapter() before the swap")
    given, wanted = state.read(folder), model.adapter_state(adapter_name)
    strangers = sorted(set(given) - set(wanted))
    if strangers:
        raise CheckpointError(f"{folder}: the adapter has no place for {', '.join(strangers[:20])}")
    ranks = _ranks(model, adapter_name)
    made = {k: _fitting(k, t, wanted[k], ranks.get(id(wanted[k]))) for k, t in given.items()}
    for key, own in wanted.items():
        if key not in made:
            own.fill_(1.0 if "ia3_l" in key else 0.0)
        elif made[key].shape == own.shape:
            own.copy_(made[key])
        else:
            own.data = made[key].to(own)
    for graft in inject.grafts_of(model, adapter_name):
        if isinstance(graft, Lora):
            graft.scale, graft.r = graft.scale_of(new), len(graft.matrices()[0])


def _fitting(key: str, given: Tensor, own: Tensor, rank: tuple[int, int] | None) -> Tensor:
    """`given` in the shape of `own`, or larger along the rank's axis."""
    axis, groups = rank or (0, 1)
    rest = [n for i, n in enumerate(own.shape) if i != axis or rank is None]
    if [n for i, n in enumerate(given.shape) if i != axis or rank is None] != rest:
        raise CheckpointError(f"{key} is {list(given.shape)}, but {list(own.shape)} here")
    short = rank is not None and given.shape[axis] < own.shape[axis]
    return padded(given, axis, own.shape[axis], groups) if short else given


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: str = "error",
) -> None:
    """Pad the matrices of every LoRA adapter with zeros to `target_rank`, so that adapters of any
    rank up to that are swapped in without compiling anew. Call it before `torch.compile`.

    `config`: the adapters' configurations (one, or by name), whose ranks become `target_rank`.
    `check_compiled`: "error", "warn" or "ignore" where the model is compiled already.
    """
    if hasattr(model, "_orig_mod") and check_compiled != "ignore":
        words = "prepare a model for hot swaps before it is compiled"
        if check_compiled == "error":
            raise ConfigError(words)
        warnings.warn(words, TopworkWarning, stacklevel=2)
    grafts = [g for layer in inject.layers_of(model) for g in layer.grafts.values()]
    loras = [graft for graft in grafts if isinstance(graft, Lora) and graft.owner is None]
    if not loras:
        raise ConfigError(f"{type(model).__name__} has no LoRA layer")
    if target_rank is None:
        return
    for graft in loras:
        if graft.r > target_rank:
            raise ConfigError(f"{graft.path} has rank {graft.r}, more than {target_rank}")
        a, b = (graft.parameter(matrix) for matrix in graft.names)
        groups = graft.site.groups
        if target_rank % groups:
            raise ConfigError(
                f"target_rank={target_rank} is no multiple of {groups} ({graft.path})"
            )
        a.data = padded(a, 0, target_rank, groups)
        b.data = padded(b, 1, target_rank // groups)
        graft.r = target_rank
    for one in config.values() if isinstance(config, dict) else [config] if config else []:
        one.r, one.rank_pattern = target_rank, {}
