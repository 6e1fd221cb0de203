"""Adapters on any module, as functions: put in, choose, remove. `PeftModel` is thin over them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from topwork.errors import ConfigError, TopworkWarning, nearest
from topwork.peft import methods
from topwork.peft.config import TASK_HEADS, LayerConfig, TaskType
from topwork.peft.graft import Graft
from topwork.peft.layer import AdaptedLayer
from topwork.peft.saved import SavedModule
from topwork.peft.sites import site_of
from topwork.peft.targets import base_of, by_pattern, ends, is_wrapper, sharing, walk
from topwork.peft.tensors import Shared, Tensors


class Modules(nn.ModuleDict):
    """Whole modules that a method keeps for the model, by adapter."""


# A file names the usual heads of its task, of which a model has one.
HEADS = frozenset(head for heads in TASK_HEADS.values() for head in heads)


def layers_of(model: nn.Module) -> Iterator[AdaptedLayer]:
    return (m for m in model.modules() if isinstance(m, AdaptedLayer))


def saved_of(model: nn.Module) -> Iterator[SavedModule]:
    return (m for m in model.modules() if isinstance(m, SavedModule))


def active_in(model: nn.Module) -> tuple[str, ...]:
    """The active adapters, which a layer that joins has too."""
    return next((part.active for part in chain(layers_of(model), saved_of(model))), ())


def inject(
    model: nn.Module, name: str, config: LayerConfig, home: nn.Module | None = None
) -> LayerConfig:
    """Put adapter `name` on the layers of `model` that `config` targets; it is not active yet.

    What a method shares between layers goes to `home` (default: `model`). Returns the
    configuration with what it left open decided.
    """
    home = model if home is None else home
    graft = methods.method(config.peft_type).GRAFT
    config = graft.settle(config, model)
    parts = graft.besides(config, model)
    taken = [path for path, _, _ in parts]
    paths = graft.paths(config, model) if config.target_modules or not parts else []
    both = sorted(set(paths) & set(taken))
    if both:
        raise ConfigError(f"{', '.join(both)} would carry two parts of one adapter")
    tell_of_patterns(config, paths)
    save_whole(model, config, name)
    found = [(path, site_of(base_of(model.get_submodule(path)))) for path in paths]
    for key, made in graft.share_from(config, found, model).items():
        if not hasattr(home, key):
            home.add_module(key, Modules() if isinstance(made, nn.Module) else Tensors())
        getattr(home, key)[name] = made
    shared = Shared(home, name, found)
    made = {path: place(model, path, name, graft, config, shared) for path in paths}
    for path, kind, own in parts:
        made[path] = place(model, path, name, kind, own, shared)
        for tied, owner in kind.companions(own, model, [path]).items():
            place(model, tied, name, kind, own, shared, made[owner])
    for path, owner in graft.companions(config, model, paths).items():
        place(model, path, name, graft, config, shared, made[owner])
    return config


def tell_of_others(model: nn.Module) -> None:
    """Warn where `model` has adapters already, as after running a cell twice."""
    if next(layers_of(model), None) is not None:
        warnings.warn(
            f"{type(model).__name__} has adapters already, which stay in its layers; unload() "
            "gives the bare model back, add_adapter() adds one",
            TopworkWarning,
            stacklevel=3,
        )


def tell_of_patterns(config: Any, paths: list[str]) -> None:
    """Warn of patterns of ranks and scales that find none of the layers at `paths`."""
    for field in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, field, None) or {}
        plain = {key: value for key, value in given.items() if isinstance(value, (int, float))}
        idle = [key for key in plain if not any(by_pattern({key: True}, p, False) for p in paths)]
        if idle and paths:
            warnings.warn(
                f"{field}: {', '.join(map(repr, idle))} finds none of the targets",
                TopworkWarning,
                stacklevel=5,
            )


def place(
    model: nn.Module,
    path: str,
    name: str,
    graft: type[Graft],
    config: LayerConfig,
    shared: Shared,
    owner: Graft | None = None,
) -> Graft:
    """Put one graft on the layer at `path`."""
    layer = model.get_submodule(path)
    if not isinstance(layer, AdaptedLayer):
        training, active = layer.training, active_in(model)
        layer = AdaptedLayer(layer)
        layer.active = active
        layer.train(training)
        put(model, path, layer)
    made = graft.of(config, layer.site)(layer, name, config, path, shared)
    made.owner = owner
    layer.add(name, made)
    made.enter(model)
    return made


def grafts_of(model: nn.Module, name: str) -> list[Graft]:
    """The grafts of adapter `name` that own their parameters."""
    found = (layer.grafts.get(name) for layer in layers_of(model))
    return [graft for graft in found if graft is not None and graft.owner is None]


def paths_to_save(model: nn.Module, config: Any) -> list[str]:
    """The modules that are trained whole: those named, and the heads of the task."""
    heads = TASK_HEADS.get(TaskType(config.task_type), ()) if config.task_type else ()
    entries: list[str] = [*(config.modules_to_save or []), *heads]
    there = dict(walk(model))
    found: list[str] = []
    for entry in dict.fromkeys(entries):
        paths = [path for path in there if ends(path, entry)]
        if not paths and entry not in HEADS:
            names = {n.rpartition(".")[2] for n in there}
            raise ConfigError(
                f"modules_to_save={entry!r} matches no module of {type(model).__name__}"
                f"{nearest(entry, names)}"
            )
        found += [path for path in paths if path not in found]
    if getattr(config, "ensure_weight_tying", False):
        found += sharing(model, [path for path in found if hasattr(there[path], "weight")])
    if heads and not found and not config.inference_mode:
        warnings.warn(
            f"task_type={config.task_type}: {type(model).__name__} has no head called "
            f"{' or '.join(heads)}, so its head stays as it is; name it in modules_to_save",
            TopworkWarning,
            stacklevel=4,
        )
    return found


def save_whole(model: nn.Module, config: Any, name: str) -> None:
    """Give adapter `name` its own copies of the modules that it trains whole."""
    copies: dict[int, Any] = {}
    for path in paths_to_save(model, config):
        module = model.get_submodule(path)
        if isinstance(module, AdaptedLayer):
            raise ConfigError(f"modules_to_save: {path} carries an adapter already")
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)):
            kind = type(module).__name__
            raise ConfigError(f"modules_to_save: {path} is a {kind}; name the modules in it")
        if not isinstance(module, SavedModule):
            module, active = SavedModule(module), active_in(model)
            module.active = active
            put(model, path, module)
        made = module.modules_to_save[name] = copy.deepcopy(module.original_module)
        if getattr(config, "ensure_weight_tying", False):
            first = copies.setdefault(id(getattr(module.original_module, "weight", made)), made)
            if hasattr(first, "weight"):
                made.weight = first.weight


def check_whole(model: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse `names` of which two have their own copy of one module."""
    for module in saved_of(model):
        owners = [name for name in names if name in module.modules_to_save]
        if len(owners) > 1:
            raise ConfigError(
                f"{' and '.join(map(repr, owners))} train a copy each of one "
                f"{type(module.original_module).__name__}; only one of them can be active"
            )


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def banks_of(home: nn.Module) -> Iterator[tuple[str, Tensors]]:
    """What methods share between layers."""
    return ((key, m) for key, m in home.named_children() if isinstance(m, Tensors))


def modules_of(home: nn.Module) -> Iterator[tuple[str, Modules]]:
    """The whole modules that methods keep."""
    return ((key, m) for key, m in home.named_children() if isinstance(m, Modules))


def activate(
    model: nn.Module, names: tuple[str, ...], train: bool = True, home: nn.Module | None = None
) -> None:
    """Let the adapters `names` compute, and (`train`) be the ones that are trained."""
    for part in (*layers_of(model), *saved_of(model)):
        part.active = names
    set_trained(model, None, False, home)
    set_trained(model, names, train, home)


def set_trained(
    model: nn.Module, names: Collection[str] | None, train: bool, home: nn.Module | None = None
) -> None:
    """Mark the parameters of the adapters `names` (None: of all) as trained or not."""
    home = model if home is None else home
    for _, bank in banks_of(home):
        for name, tensor in bank.named_parameters():
            if names is None or name in names:
                tensor.requires_grad_(train)
    for _, kept in modules_of(home):
        for name, module in kept.items():
            if names is None or name in names:
                module.requires_grad_(train)
    for layer in layers_of(model):
        for name, graft in layer.grafts.items():
            if names is None or name in names:
                graft.trains(train)
    for module in saved_of(model):
        for name, copied in module.modules_to_save.items():
            if names is None or name in names:
                copied.requires_grad_(train)


def remove(model: nn.Module, name: str, home: nn.Module | None = None) -> None:
    """Take adapter `name` out; layers that then carry none are as before."""
    home = model if home is None else home
    for _, kept in (*banks_of(home), *modules_of(home)):
        if name in kept:
            del kept[name]
    for path, module in wrappers(model):
        if isinstance(module, AdaptedLayer):
            module.remove(name)
            if not module.grafts:
                put(model, path, module.base_layer)
        elif name in module.modules_to_save:
            del module.modules_to_save[name]
            module.active = tuple(n for n in module.active if n != name)
            if not module.modules_to_save:
                put(model, path, module.original_module)


def wrappers(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules with adapters, by path."""
    return [(path, m) for path, m in walk(model) if is_wrapper(m)]


def own_weights(model: Any) -> None:
    """Give each adapted layer a weight of its own where others use the same one (a tied head,
    replicated layers), so that merging into it leaves them as they are. A head that follows the
    embedding's adapter stays tied."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    following = {id(g.owner.base) for la in layers_of(model) for g in la.grafts.values() if g.owner}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for layer in layers_of(model):
        base, companion = layer.base_layer, any(g.owner for g in layer.grafts.values())
        if companion or id(base) in following or not layer.grafts:
            continue
        for name, parameter in base._parameters.items():
            if parameter is None or len(users[id(parameter)]) == 1:
                continue
            if head is not None and base_of(head) in users[id(parameter)]:
                model.config.tie_word_embeddings = False
                getattr(model, "tied", {}).clear()
            users[id(parameter)].remove(base)
            base._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


def checkpoints_reentrantly(model: Any) -> bool:
    """Whether `model` recomputes blocks as transformers' models may, and ours do not."""
    if hasattr(model, "backbone"):
        return False
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second is the older
    return bool(next((getattr(model, name) for name in names if hasattr(type(model), name)), False))


def let_inputs_have_gradients(model: Any) -> None:
    """Let the outputs of a frozen embedding have gradients, as transformers' reentrant
    checkpointing needs where what it stands around has no other trained input."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_gradients)


def _require_gradients(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def cast_to_base(model: nn.Module, name: str, home: nn.Module) -> None:
    """Give the parameters of adapter `name` the dtype of the layers below."""
    shared = [bank[name] for _, bank in banks_of(home) if name in bank]
    for layer in layers_of(model):
        dtype = next((p.dtype for p in layer.base_layer.parameters()), torch.float32)
        for tensor in (*(t for _, t in layer.held(name)), *shared):
            if dtype.is_floating_point and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        shared = []


def strip(model: nn.Module) -> nn.Module:
    """`model` without any wrapper: bases as they are, saved modules as they compute."""
    for path, module in wrappers(model):
        for graft in module.grafts.values() if isinstance(module, AdaptedLayer) else ():
            graft.leave()
        put(model, path, module.base_layer if isinstance(module, AdaptedLayer) else module.chosen)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes as without adapters; merged ones are out of the weights."""
    parts = [*layers_of(model), *saved_of(model)]
    before = [part.disabled for part in parts]
    merged = [(layer, layer.merged_adapters) for layer in layers_of(model) if layer.merged]
    for part in parts:
        part.disabled = True
    for layer, _ in merged:
        layer.unmerge()
    try:
        yield
    finally:
        for part, was in zip(parts, before):
            part.disabled = was
        for layer, names in merged:
            layer.merge(adapter_names=names)


@contextmanager
def using(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Within it the model computes with the adapters `names`; what is trained stays."""
    parts = [*layers_of(model), *saved_of(model)]
    before = [part.active for part in parts]
    for part in parts:
        part.active = names
    try:
        yield
    finally:
        for part, was in zip(parts, before):
            part.active = was
