"""Verbs on any module, without `PeftModel` around it, and helpers that scripts import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, TopworkError
from topwork.peft import inject, methods, state, store
from topwork.peft.config import LayerConfig, PeftConfig
from topwork.peft.methods.lora import Lora
from topwork.peft.model import PeftModel
from topwork.peft.store import LoadResult
from topwork.peft.tensors import check_name


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration of the method that `config_dict["peft_type"]` names."""
    return PeftConfig.from_dict(config_dict)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: Any,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Freeze `model`, put an adapter on its layers in place, make it active; returns `model`.

    `state_dict`: the adapter goes to the layers of which it has tensors, whatever the
    configuration targets; `set_peft_model_state_dict` puts those into it.
    Adapters are made where the layers are, so `low_cpu_mem_usage` has no effect.
    """
    if not isinstance(peft_config, LayerConfig):
        raise ConfigError(f"{type(peft_config).__name__} does not go to layers; use get_peft_model")
    compiled, model = model, getattr(model, "_orig_mod", model)
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    check_name(adapter_name, configs)
    if not configs:
        model.requires_grad_(False)
        model.peft_config = configs
    if state_dict is None:
        config = inject.inject(model, adapter_name, peft_config)
    else:
        graft = methods.method(peft_config.peft_type).GRAFT
        settled = peft_config
        with suppress(ConfigError):  # where nothing is usual, the tensors say all
            settled = graft.settle(peft_config, model)
        found = state.targeted(settled, model, state_dict)
        config = inject.inject(model, adapter_name, found)
        config = replace(config, target_modules=peft_config.target_modules)
    configs[adapter_name] = config
    inject.activate(model, (adapter_name,), not config.inference_mode)
    for _, parameter in state.bias_parameters(model, config):
        parameter.requires_grad_(not config.inference_mode)
    return compiled


def get_peft_model_state_dict(
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors: of a `PeftModel` under their names in files, of another module (see
    `inject_adapter_in_model`) under those less the prefix.

    `state_dict`: the values of the whole model, where they were gathered from elsewhere.
    `save_embedding_layers=True` adds the base's embeddings. A compiled model is always looked into.
    """
    if isinstance(model, tuple(_sharded())) and state_dict is None:
        state_dict = model.state_dict()
    model = _unwrapped(model)
    found = _wanted(model, adapter_name)
    if save_embedding_layers is True and isinstance(model, PeftModel):
        found |= store.embeddings_of(model)
    if state_dict is not None:
        held = (*model.named_parameters(), *model.named_buffers())
        names = {id(tensor): _clean(name) for name, tensor in held}
        found = {key: state_dict.get(names.get(id(t), ""), t) for key, t in found.items()}
    return {_clean(key): tensor.detach() for key, tensor in found.items()}


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Under what torch's compiling, sharding and checkpointing keep the module that they wrap."""


def _sharded() -> list[Any]:
    """FullyShardedDataParallel, where somebody imported it."""
    found = sys.modules.get("torch.distributed.fsdp")
    return [] if found is None else [found.FullyShardedDataParallel]


def _unwrapped(model: Any) -> Any:
    """The model inside a compiled, sharded or distributed one."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, (DistributedDataParallel, *_sharded())) else model


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _wanted(model: Any, name: str) -> dict[str, Tensor]:
    if isinstance(model, PeftModel):
        return model.adapter_state(name)
    configs = getattr(model, "peft_config", {})
    if name not in configs:
        raise ConfigError(f"{type(model).__name__} has no adapter {name!r}")
    return state.tensors_of(model, configs[name], name)


@torch.no_grad()
def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy tensors into an adapter, and into the base's parameters that they name; returns the keys
    that were missing and those not known.

    Raises CheckpointError for a tensor of another shape, unless `ignore_mismatched_sizes`.
    Adapters are made where the layers are, so `low_cpu_mem_usage` has no effect.
    """
    model = _unwrapped(model)
    wanted = {_clean(key): tensor for key, tensor in _wanted(model, adapter_name).items()}
    if not isinstance(model, PeftModel):
        prefix = state.PREFIX + "model."
        peft_model_state_dict = {
            k.removeprefix(prefix): v for k, v in peft_model_state_dict.items()
        }
    held = {_clean(name): parameter for name, parameter in model.named_parameters()}
    wanted |= {k: held[k] for k in peft_model_state_dict if k not in wanted and k in held}
    for key in sorted(wanted.keys() & peft_model_state_dict.keys()):
        own, given = wanted[key], peft_model_state_dict[key]
        if own.shape == given.shape:
            own.copy_(given)
        elif not ignore_mismatched_sizes:
            raise CheckpointError(f"{key} is {list(given.shape)}, but {list(own.shape)} here")
    return LoadResult(
        sorted(wanted.keys() - peft_model_state_dict.keys()),
        sorted(peft_model_state_dict.keys() - wanted.keys()),
    )


def load_peft_weights(model_id: str | Path, device: str | None = None, **where: Any
                      ) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of an adapter's folder or Hub id."""
    given = state.read(hub.resolve(model_id, want=("adapter",), **where).folder)
    return {k: v.to(device) for k, v in given.items()} if device else given


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a folder or Hub id holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except TopworkError:
        return False
    return True


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters to `dtype`, trained ones to fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze `model` and switch activation checkpointing on. Norms and the head compute in the
    dtype that they have: adapters are fp32 already. So nothing is left for `auto_clear_cache` to
    free."""
    model.requires_grad_(False)
    if use_gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or {"use_reentrant": False}
        )
    return model


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within it every LoRA counts `multiplier` times as much."""
    grafts = [g for layer in inject.layers_of(model) for g in layer.grafts.values()]
    loras = [(graft, graft.scale) for graft in grafts if isinstance(graft, Lora)]
    if not loras:
        raise ConfigError(f"{type(model).__name__} has no LoRA layer")
    for graft, scale in loras:
        graft.scale = scale * multiplier
    try:
        yield
    finally:
        for graft, scale in loras:
            graft.scale = scale
