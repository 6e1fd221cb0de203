"""A `PeftModel`'s adapters to files and back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork import hub
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import card, state
from topwork.peft.config import PeftConfig
from topwork.peft.methods.lora import LoraConfig


class LoadResult(NamedTuple):
    """The tensors that were missing, and those not known."""

    missing_keys: list[str]
    unexpected_keys: list[str]


HOW = (
    "device_map",
    "dtype",
    "ephemeral_gpu_offload",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_dir",
    "offload_folder",
    "torch_device",
    "torch_dtype",
    "use_safetensors",
)


def tensors_of(model: Any, name: str) -> dict[str, Tensor]:
    """The tensors of the adapter `name` under their names in files."""
    config: PeftConfig = model.peft_config[name]
    # In peft a tuner that adapts layers stands around the model, and its name in the path.
    home = model.get_base_model() if config.is_prompt_learning else model.base_model
    found = state.tensors_of(home, config, name)
    named = {state.PREFIX + key: tensor for key, tensor in found.items()}
    named = state.in_files(model.get_base_model(), named)
    named |= model.prompt_encoder[name].saved() if name in model.prompt_encoder else {}
    return config.to_file(named)


def embeddings_of(model: Any) -> dict[str, Tensor]:
    """The base's embeddings and head under their names in files."""
    words = state.embeddings_of(model.base_model, model.get_base_model())
    return {state.PREFIX + key: tensor for key, tensor in words.items()}


def resized(model: Any, config: PeftConfig) -> bool:
    """Whether `model` has another number of words than the base that `config` names, where its
    configuration lies on this machine."""
    base, sizes = config.base_model_name_or_path, getattr(model.get_base_model(), "config", None)
    words = getattr(sizes, "vocab_size", None)
    if not base or words is None:
        return False
    try:
        checkpoint = hub.resolve(base, want=("config",), local_files_only=True)
        return hub.read_json(checkpoint.folder / "config.json").get("vocab_size", words) != words
    except CheckpointError:
        return False


def save(
    model: Any,
    name: str,
    folder: Path,
    embeddings: bool | str,
    initial: str | Path | None = None,
) -> None:
    """Write an adapter as peft does: "default" into `folder`, others below it by name.

    `initial`: the folder of the same adapter before training, from a start that changed the base
    (PiSSA, OLoRA, CorDA …): what is written is then their difference, for the base as it was.
    """
    config: PeftConfig = model.peft_config[name]
    tensors = config.packed(tensors_of(model, name))
    if initial is not None:
        config, tensors = since(config, tensors, state.read(Path(initial)))
    numbers = sum(t.numel() for t in tensors.values())
    if embeddings is True or (embeddings == "auto" and resized(model, config)):
        tensors |= embeddings_of(model)
    folder = folder if name == "default" else folder / name
    state.write(tensors, config, folder)
    card.write(folder, config, numbers)


def since(
    config: PeftConfig, after: dict[str, Tensor], before: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter that is the change from `before` to `after`: B A - B₀ A₀, of twice the
    rank."""
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{config.peft_type} has no start that could be taken off; LoRA has")
    if config.use_dora or config.lora_bias:
        raise ConfigError("the start is not taken off with use_dora or lora_bias")
    if {k: t.shape for k, t in before.items()} != {k: t.shape for k, t in after.items()}:
        raise CheckpointError("the adapter before training has other tensors than the one after")
    made = dict(after)
    for key, tensor in after.items():
        if "lora_A" in key:
            made[key] = torch.cat([tensor.detach(), before[key].to(tensor)])
        elif "lora_B" in key:
            made[key] = torch.cat([tensor.detach(), -before[key].to(tensor)], 1)
    grown = 2**0.5 if config.use_rslora else 2  # the scale stays: alpha/√r, alpha/r
    starts: Any = {name: {} if name == "loftq_config" else None for name in config.STARTS.values()}
    changed = replace(
        config,
        **starts,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * grown,
        rank_pattern={key: 2 * value for key, value in config.rank_pattern.items()},
        alpha_pattern={key: value * grown for key, value in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return changed, made


def renamed(given: dict[str, Tensor], mapping: dict[str, str] | None) -> dict[str, Tensor]:
    """`given` with what the first fitting pattern of `mapping` finds in a name replaced, as in
    transformers' `key_mapping`: both sides are names in the bare model."""
    made: dict[str, Tensor] = {}
    for key, tensor in given.items():
        prefix = state.MODEL if key.startswith(state.MODEL) else state.PREFIX
        name = key.removeprefix(prefix)
        for pattern, new in (mapping or {}).items():
            name, count = re.subn(pattern, new, name)
            if count:
                break
        made[prefix + name if key.startswith(prefix) else name] = tensor
    return made


def folder_of(model_id: str | Path, where: dict[str, Any]) -> Path:
    """The folder of an adapter. What only says how peft shall load it is taken out of `where`:
    adapters are made where their layers are, in fp32 or in their dtype."""
    for name in HOW:
        where.pop(name, None)
    return hub.resolve(model_id, want=("adapter",), **where).folder


def fill(
    model: Any, name: str, folder: Path, allow_bin: bool, mapping: dict[str, str] | None
) -> None:
    """Read the adapter `name` of `model` from `folder`."""
    wanted, source = tensors_of(model, name), str(state.weights_file(folder, allow_bin))
    if mapping is None:  # transformers' models say under which names older files have them
        mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)
    given = renamed(state.read(folder, allow_bin), mapping)
    given = model.peft_config[name].from_file(given, wanted)
    if state.meet(model.get_base_model(), name, given):
        wanted = tensors_of(model, name)
    if name in model.prompt_encoder:
        prompt = model.prompt_encoder[name]
        wanted = {k: v for k, v in wanted.items() if k not in prompt.saved()}
        prompt.load(given, source)
    words = embeddings_of(model)
    wanted |= {key: words[key] for key in words.keys() & given.keys()}
    state.fill(wanted, state.recognised(model.get_base_model(), given, wanted), source)
