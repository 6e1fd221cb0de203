"""Any change of linear weights as a LoRA adapter, by truncated SVD."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError, TopworkWarning
from topwork.peft import inject, sites, state
from topwork.peft.methods.lora import LoraConfig


@torch.no_grad()
def convert_to_lora(
    model: Any, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter nearest to the adapter `adapter_name` of any method.

    `rank`: the number of directions, or the share of each change's energy that is kept. Returns
    the configuration and the tensors under their names in files.
    """
    grafts = inject.grafts_of(model, adapter_name)
    deltas = {graft.path: _change_by(graft) for graft in grafts}
    config, tensors = lora_of(deltas, rank)
    source = model.peft_config[adapter_name]
    config.task_type = source.task_type
    config.base_model_name_or_path = source.base_model_name_or_path
    return config, tensors


def _change_by(graft: Any) -> Tensor:
    """What an adapter adds to its linear's weight; ConfigError where that is not all it does."""
    if graft.site.kind != "linear":
        raise ConfigError(f"{graft.path} is no linear layer; it cannot be converted to LoRA")
    weight, bias = graft.weight, getattr(graft.base, "bias", None)
    made, moved = graft.merged(weight, None if bias is None else bias.detach().float())
    if bias is not None and moved is not None and not torch.equal(moved, bias.float()):
        raise ConfigError(f"the adapter changes the bias of {graft.path}; LoRA does not")
    return made - weight


@torch.no_grad()
def converts(model: nn.Module, adapter_name: str) -> bool:
    """Whether `convert_to_lora` has a LoRA adapter for this one."""
    grafts = inject.grafts_of(model, adapter_name)
    try:
        return bool(grafts) and all(_change_by(graft) is not None for graft in grafts)
    except ConfigError:
        return False


def lora_of(deltas: dict[str, Tensor], rank: int | float) -> tuple[LoraConfig, dict[str, Tensor]]:
    """LoRA matrices for changes [out, in] of the linears at these paths; see `convert_to_lora`."""
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(f"rank={rank} is a share of the energy and must be in (0, 1]")
    if isinstance(rank, int) and rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    if not deltas:
        raise ConfigError("there is no change to convert")
    ranks, tensors = {}, {}
    for path, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
        r = rank if isinstance(rank, int) else _enough(s, rank)
        if r > len(s):
            raise ConfigError(f"rank={r} is more than the {len(s)} that {path} has")
        ranks[path] = r
        tensors[f"{state.PREFIX}model.{path}.lora_A.weight"] = vh[:r].contiguous()
        tensors[f"{state.PREFIX}model.{path}.lora_B.weight"] = u[:, :r] * s[:r]
    most = max(ranks.values())
    different = {f"^{path}": r for path, r in ranks.items() if r != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(deltas),
        rank_pattern=different,
        alpha_pattern=dict(different),
    )
    return config, tensors


def _enough(values: Tensor, share: float) -> int:
    """How many singular values hold `share` of the energy."""
    energy = values.square().cumsum(0)
    return min(int(torch.searchsorted(energy, share * energy[-1])) + 1, len(values))


def save_as_lora(
    path: str | Path, model: nn.Module, rank: int | float, adapter_name: str = "default"
) -> None:
    """Write `convert_to_lora`'s adapter to the folder `path`."""
    config, tensors = convert_to_lora(model, rank, adapter_name)
    state.write(tensors, config, Path(path))


@torch.no_grad()
def extract_lora(
    tuned: nn.Module, base: nn.Module, rank: int | float, save_rest: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter that turns the linears of `base` nearest to those of `tuned`.

    Norms, embeddings and biases that differ go into the adapter whole (`modules_to_save`) with
    `save_rest`; else a TopworkWarning names them. ConfigError for models of two shapes.
    """
    theirs = dict(base.named_modules())
    deltas: dict[str, Tensor] = {}
    rest: dict[str, nn.Module] = {}
    for path, module in tuned.named_modules():
        if path not in theirs:
            raise ConfigError(f"the base has no {path}")
        linear = sites.site_of(module).kind == "linear"
        if linear:
            delta = _change(path, sites.read_weight(module), sites.read_weight(theirs[path]))
            if bool(delta.any()):
                deltas[path] = delta
        others = dict(theirs[path].named_parameters(recurse=False))
        for name, after in module.named_parameters(recurse=False):
            if name not in others or (linear and name == "weight"):
                continue
            if bool(_change(f"{path}.{name}", after, others[name]).any()):
                rest[path] = module
    config, tensors = lora_of(deltas, rank)
    both = sorted(set(rest) & set(deltas))
    if rest and (not save_rest or both):
        left = both if save_rest else sorted(rest)
        warnings.warn(
            f"the models differ in {len(left)} modules more, which the adapter does not hold: "
            + ", ".join(left[:8]),
            TopworkWarning,
            stacklevel=2,
        )
    if save_rest and (whole := sorted(set(rest) - set(both))):
        config.modules_to_save = whole
        for path in whole:
            for name, value in rest[path].state_dict().items():
                tensors[f"{state.PREFIX}model.{path}.{name}"] = value.clone()
    return config, tensors


def _change(name: str, after: Tensor, before: Tensor) -> Tensor:
    if after.shape != before.shape:
        raise ConfigError(f"{name} is {list(after.shape)} in one, {list(before.shape)} in the base")
    return after.float() - before.float()
