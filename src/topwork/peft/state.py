"""An adapter's tensors under their names in files, out of a model and into it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from topwork.errors import CheckpointError, ConfigError
from topwork.peft.config import TASK_HEADS, LayerConfig, PeftConfig
from topwork.peft.graft import Graft
from topwork.peft.inject import banks_of, layers_of, modules_of
from topwork.peft.layer import AdaptedLayer
from topwork.peft.saved import SavedModule
from topwork.peft.targets import base_of, ends, walk
from topwork.weights import pickled, write_tensors

FILES = ("adapter_model.safetensors", "adapter.safetensors")
PICKLE = "pytorch_adapter.bin"
PREFIX = "base_model."
ROUTER = "internal_xlora_classifier"
MODEL = PREFIX + "model."


def bias_parameters(model: nn.Module, config: PeftConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's biases that an adapter with this `bias` setting trains."""
    mode = getattr(config, "bias", "none")
    if mode == "none":
        return
    own = (getattr(layer.base_layer, "bias", None) for layer in layers_of(model))
    adapted = {id(bias) for bias in own if bias is not None}
    for name, parameter in model.named_parameters():
        wanted = name.endswith("bias") and (mode == "all" or id(parameter) in adapted)
        if wanted and not _within_adapter(model, name):
            yield name, parameter


def _within_adapter(model: nn.Module, name: str) -> bool:
    """Whether the parameter `name` is an adapter's rather than the base's."""
    at: Any = model
    for part in name.split("."):
        if isinstance(at, AdaptedLayer) and part != "base_layer":
            return True
        if isinstance(at, SavedModule) and part != "original_module":
            return True
        at = getattr(at, part)
    return False


def tensors_of(home: nn.Module, config: PeftConfig, name: str) -> dict[str, Tensor]:
    """The adapter's tensors by their names below `home`; in files `PREFIX` stands before them."""
    router = getattr(home, ROUTER, None)
    if router is not None and router.owner == name:
        return {
            f"{ROUTER}.{key}": tensor for key, tensor in router.state_dict(keep_vars=True).items()
        }
    # What follows from a seed is not written, and projections only where they are asked for.
    every = getattr(config, "save_projection", True)
    banks = ((key, bank) for key, bank in banks_of(home) if not key.startswith("_"))
    state = {key: bank[name] for key, bank in banks if name in bank}
    state = {k: t for k, t in state.items() if every or isinstance(t, nn.Parameter)}
    for key, kept in modules_of(home):
        if name in kept:  # in files under "default", whatever the adapter's name
            held = kept[name].state_dict(keep_vars=True)
            inner = "decoder." if all(rest.startswith("decoder.") for rest in held) else ""
            names = {rest.removeprefix(inner): tensor for rest, tensor in held.items()}
            state |= {f"{key}.default.{rest}": tensor for rest, tensor in names.items()}
    for path, module in home.named_modules():
        if isinstance(module, AdaptedLayer):
            if name in module.grafts:
                saved = module.grafts[name].saved()
                state |= {f"{path}.{key}": tensor for key, tensor in saved}
        elif isinstance(module, SavedModule) and name in module.modules_to_save:
            trained = module.modules_to_save[name].state_dict(keep_vars=True)
            state |= {f"{path}.{key}": tensor for key, tensor in trained.items()}
    return state | dict(bias_parameters(home, config))


def embeddings_of(home: nn.Module, model: Any) -> dict[str, Tensor]:
    """The weights of the base's input embedding and output head, by their names below `home`."""
    gets = (getattr(model, n, None) for n in ("get_input_embeddings", "get_output_embeddings"))
    found = []
    for get in gets:
        with suppress(NotImplementedError):  # transformers' models without any
            found.append(get() if callable(get) else None)
    bases = {id(base_of(module)) for module in found if module is not None}
    return {
        f"{path}.weight": module.get_parameter("weight")
        for path, module in home.named_modules()
        if id(module) in bases
    }


def in_files(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the names that adapters' files have for `model`, where it tells them."""
    table = getattr(model, "adapter_table", None)
    if table is None:
        return tensors
    return {
        MODEL + table.disk_name(key.removeprefix(MODEL)) if key.startswith(MODEL) else key: tensor
        for key, tensor in tensors.items()
    }


def recognised(
    model: Any, given: dict[str, Tensor], wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`given` under the names of `wanted`, from any layout of the model that is known."""
    tables = [getattr(model, name, None) for name in ("adapter_table", "table")]
    found: dict[str, Tensor] = {}
    for key, tensor in given.items():
        name = key
        if key not in wanted and key.startswith(MODEL):
            paths = [t.memory_name(key.removeprefix(MODEL)) for t in tables if t is not None]
            homes = [next(iter(in_files(model, {MODEL + path: tensor}))) for path in paths]
            name = next((home for home in homes if home in wanted), key)
        found[name] = tensor
    return found


def retargeted(config: PeftConfig, model: Any, folder: Path) -> PeftConfig:
    """`config` for `model`, where its targets have the names of another layout that is known.

    Then the targets become the paths that the file's own tensors name.
    """
    targets, table = getattr(config, "target_modules", None), getattr(model, "table", None)
    if table is None or isinstance(targets, str) or not targets:
        return config
    here = {name for name, _ in model.named_modules()}
    if all(any(f".{name}".endswith(f".{target}") for name in here) for target in targets):
        return config
    paths = {key.removeprefix(MODEL).split(".lora_")[0] for key in read(folder) if ".lora_" in key}
    homes = {table.memory_name(path + ".weight").removesuffix(".weight") for path in paths}
    found: Any = {"target_modules": sorted(homes)}
    return replace(config, **found) if homes and homes <= here else config


def make_room(model: Any, config: PeftConfig, folder: Path) -> None:
    """Give `model` the tokens that the adapter in `folder` was trained with, where it has fewer:
    those that it trains by number, and those of an embedding that its file holds or changes."""
    if not callable(getattr(model, "resize_token_embeddings", None)):
        return
    words: Any = base_of(model.get_input_embeddings())
    if not hasattr(words, "num_embeddings"):  # a model of sounds
        return
    path = next(f"{MODEL}{p}" for p, m in model.named_modules() if base_of(m) is words)
    given: Any = getattr(config, "trainable_token_indices", None)
    given = getattr(config, "token_indices", None) if given is None else given
    lists = given.values() if isinstance(given, dict) else [given or []]
    wanted = max((index + 1 for indices in lists for index in indices), default=0)
    for key, shape in shapes(folder).items():
        inner = key.removeprefix(f"{path}.")
        if inner == "weight" or (inner != key and inner.endswith("base_layer.weight")):
            wanted = max(wanted, shape[0])
        elif inner == "lora_embedding_A":
            wanted = max(wanted, shape[1])
    if wanted > words.num_embeddings:
        model.resize_token_embeddings(wanted)


@torch.no_grad()
def meet(model: Any, name: str, given: dict[str, Tensor]) -> bool:
    """Show each layer of adapter `name` what a file has for it; whether any wanted to see it."""
    grafts = [layer.grafts[name] for layer in layers_of(model) if name in layer.grafts]
    grafts = [graft for graft in grafts if type(graft).meets is not Graft.meets]
    for graft in grafts:
        own = {n: f"{MODEL}{graft.path}.{n}" for n, _ in graft.saved()}
        graft.meets({n: given[key] for n, key in own.items() if key in given})
    return bool(grafts)


def targeted(config: LayerConfig, model: nn.Module, given: dict[str, Tensor]) -> LayerConfig:
    """`config` for the layers of `model` of which there are tensors `given`, and no others."""
    if getattr(config, "target_parameters", None):
        raise ConfigError("target_parameters are not seen from names of tensors: no state_dict")
    here = dict(walk(model))
    whole = [*(config.modules_to_save or []), *TASK_HEADS.get(config.task_type, ())]  # type: ignore[call-overload]
    paths: set[str] = set()
    for key in given:
        path = key.removeprefix(MODEL).removeprefix("_orig_mod.")
        while path and path not in here:
            path = path.rpartition(".")[0]
        if path and not any(ends(path, entry) for entry in whole):
            paths.add(path)
    if not paths:
        raise ConfigError(f"state_dict has no tensor of a module of {type(model).__name__}")
    exactly = "|".join(re.escape(path) for path in sorted(paths))
    free: Any = {"target_modules": exactly, "exclude_modules": None}
    return replace(config, **free, layers_to_transform=None, layers_pattern=None)


@torch.no_grad()
def fill(wanted: dict[str, Tensor], given: dict[str, Tensor], source: str) -> None:
    """Copy `given` into `wanted`, which must have the same names and shapes."""
    shared = {key.rpartition(".")[2] for key in wanted if key.count(".") == 1}
    # peft repeats in each layer what the layers share.
    given = {k: v for k, v in given.items() if k in wanted or k.rpartition(".")[2] not in shared}
    missing, unexpected = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    wrong = [
        f"{k} {list(given[k].shape)} in the file, {list(wanted[k].shape)} here"
        for k in sorted(set(given) & set(wanted))
        if given[k].shape != wanted[k].shape
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    problems = [f"{what}: {', '.join(names[:20])}" for what, names in parts if names]
    if problems:
        raise CheckpointError(f"{source}: does not fit this model: " + "; ".join(problems))
    for key, tensor in given.items():
        wanted[key].copy_(tensor)


def weights_file(folder: Path, allow_bin: bool = False) -> Path:
    """The file that holds the tensors of an adapter's folder."""
    for name in (*FILES, *((PICKLE,) if allow_bin else ())):
        if (folder / name).is_file():
            return folder / name
    hint = f" ({PICKLE} is read only with allow_bin=True)" if (folder / PICKLE).is_file() else ""
    raise CheckpointError(f"{folder / FILES[0]}: there is no such file{hint}")


def read(folder: Path, allow_bin: bool = False) -> dict[str, Tensor]:
    """The tensors of an adapter's folder."""
    path = weights_file(folder, allow_bin)
    if path.name == PICKLE:
        return {name: get() for name, get in pickled(path)}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of what `read` gives, without reading it; empty for a pickle."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def write(state: dict[str, Tensor], config: PeftConfig, folder: Path) -> None:
    """An adapter's two files; the weights appear whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder, inference_mode=True)
    made: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in state.items():
        whole = tensor.detach().contiguous()
        made[key] = whole.clone() if whole.data_ptr() in places else whole  # tied: written twice
        places.add(whole.data_ptr())
    write_tensors(folder / config.WEIGHTS, made)
