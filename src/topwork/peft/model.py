"""`PeftModel`: a model with named adapters, the verbs that people know, and peft's files."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, nearest
from topwork.peft.config import LoraConfig
from topwork.peft.layer import LoraLayer, SavedModule
from topwork.peft.targets import target_names

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def get_peft_model(model: nn.Module, config: LoraConfig, adapter_name: str = "default"
                   ) -> PeftModel:  # fmt: skip
    """Freeze `model` (any module) and graft an adapter on it."""
    return PeftModel(model, config, adapter_name)


class _Holder(nn.Module):
    """Stands where peft's tuner stands, so that names in memory equal those of its files."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class PeftModel(nn.Module):
    """`model` with adapters. What it does not know itself it asks of the wrapped model."""

    def __init__(self, model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> None:
        super().__init__()
        self.base_model = _Holder(model)
        self.peft_config: dict[str, LoraConfig] = {}
        model.requires_grad_(False)
        self.add_adapter(adapter_name, config)
        self.set_adapter(adapter_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    # -- adapters --------------------------------------------------------------------------------

    def _layers(self) -> Iterator[LoraLayer]:
        return (m for m in self.modules() if isinstance(m, LoraLayer))

    def _saved(self) -> Iterator[SavedModule]:
        return (m for m in self.modules() if isinstance(m, SavedModule))

    @property
    def active_adapters(self) -> list[str]:
        return list(next(self._layers()).active)

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Create an adapter beside those that are there; it does not become active."""
        if name in self.peft_config:
            raise ConfigError(f"there is an adapter {name!r} already")
        model = self.get_base_model()
        paths = target_names(model, config)
        for path in config.modules_to_save or []:
            self._save_whole(path, name)
        for path in paths:
            layer = model.get_submodule(path)
            if not isinstance(layer, LoraLayer):
                layer = LoraLayer(layer)
                layer.train(self.training)
                _put(model, path, layer)
            rank = _by_pattern(config.rank_pattern, path, config.r)
            layer.add(
                name, config, rank, _by_pattern(config.alpha_pattern, path, config.lora_alpha)
            )
        origin = getattr(getattr(model, "config", None), "_name_or_path", None)
        named = config.base_model_name_or_path or origin
        self.peft_config[name] = replace(config, base_model_name_or_path=named)

    def _save_whole(self, entry: str, name: str) -> None:
        model = self.get_base_model()
        paths = [
            n
            for n, _ in model.named_modules()
            if (n == entry or n.endswith("." + entry)) and "modules_to_save" not in n
        ]
        if not paths:
            names = {n.rpartition(".")[2] for n, _ in model.named_modules()}
            raise ConfigError(
                f"modules_to_save={entry!r} matches no module of {type(model).__name__}"
                f"{nearest(entry, names)}"
            )
        for path in paths:
            module = model.get_submodule(path)
            if not isinstance(module, SavedModule):
                module = SavedModule(module)
                _put(model, path, module)
            module.modules_to_save[name] = copy.deepcopy(module.original_module)

    def set_adapter(self, names: str | list[str]) -> None:
        """Make these adapters the active and trainable ones."""
        wanted = (names,) if isinstance(names, str) else tuple(names)
        for name in wanted:
            self._known(name)
        for layer in self._layers():
            layer.active = wanted
            for name in layer.names():
                for matrix in layer.matrices(name):
                    matrix.requires_grad_(name in wanted)
        for module in self._saved():
            module.active = wanted
            for name, trained in module.modules_to_save.items():
                trained.requires_grad_(name in wanted)
        for _, parameter in self._bias_parameters(self.peft_config[wanted[0]].bias):
            parameter.requires_grad_(True)

    def _known(self, name: str) -> LoraConfig:
        if name not in self.peft_config:
            raise ConfigError(f"there is no adapter {name!r}{nearest(name, self.peft_config)}")
        return self.peft_config[name]

    def _bias_parameters(self, mode: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's biases that an adapter with this `bias` mode trains."""
        adapted = {id(layer.bias) for layer in self._layers() if layer.bias is not None}
        if mode == "none":
            return
        for name, parameter in self.named_parameters():
            is_bias = name.endswith("bias") and "modules_to_save" not in name
            if is_bias and (mode == "all" or id(parameter) in adapted):
                yield name, parameter

    def delete_adapter(self, name: str) -> None:
        self._known(name)
        if len(self.peft_config) == 1:
            raise ConfigError(f"{name!r} is the only adapter; use unload() for the bare model")
        for layer in self._layers():
            layer.remove(name)
        for module in self._saved():
            module.modules_to_save.pop(name)
        del self.peft_config[name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model computes as without adapters (merged ones stay)."""
        parts = [*self._layers(), *self._saved()]
        for part in parts:
            part.disabled = True
        try:
            yield
        finally:
            for part in parts:
                part.disabled = False

    # -- merging ---------------------------------------------------------------------------------

    def merge_adapter(self, names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the adapters' deltas to the base weights; `unmerge_adapter` takes them out."""
        for name in names or []:
            self._known(name)
        for layer in self._layers():
            layer.merge(names or list(layer.active), safe_merge)

    def unmerge_adapter(self) -> None:
        for layer in self._layers():
            layer.unmerge()

    def merge_and_unload(self, safe_merge: bool = False) -> nn.Module:
        """The base model with the active adapters in its weights, and nothing of Topwork's left."""
        self.merge_adapter(safe_merge=safe_merge)
        return self._strip()

    def unload(self) -> nn.Module:
        """The base model as it was."""
        self.unmerge_adapter()
        for module in self._saved():
            module.active = ()
        return self._strip()

    def _strip(self) -> nn.Module:
        model = self.get_base_model()
        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                _put(model, path, module.base_layer)
            elif isinstance(module, SavedModule):
                chosen = [n for n in module.active if n in module.modules_to_save]
                trained = module.modules_to_save[chosen[0]] if chosen else module.original_module
                _put(model, path, trained)
        return model

    # -- counting --------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    # -- files -----------------------------------------------------------------------------------

    def adapter_state(self, name: str = "default") -> dict[str, Tensor]:
        """The adapter's tensors under the names of `adapter_model.safetensors`."""
        bias = {n for n, _ in self._bias_parameters(self._known(name).bias)}
        state: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            if f".modules_to_save.{name}." in key:
                state[key.replace(f".modules_to_save.{name}.", ".")] = value
            elif re.search(rf"\.lora_\w+\.{re.escape(name)}(\.|$)", key):
                state[re.sub(rf"(\.lora_\w+)\.{re.escape(name)}(?=\.|$)", r"\1", key)] = value
            elif key in bias:
                state[key] = value
        return state

    def save_pretrained(self, folder: str | Path, selected_adapters: list[str] | None = None
                        ) -> None:  # fmt: skip
        """Write each adapter as peft does: "default" into `folder`, others below it by name."""
        for name in selected_adapters or list(self.peft_config):
            self._known(name)
            home = Path(folder) if name == "default" else Path(folder) / name
            home.mkdir(parents=True, exist_ok=True)
            state = {k: v.detach().contiguous() for k, v in self.adapter_state(name).items()}
            staged = home / f".{WEIGHTS}.part"
            save_file(state, staged, metadata={"format": "pt"})
            self.peft_config[name].save_pretrained(home)
            staged.replace(home / WEIGHTS)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **where: Any,
    ) -> PeftModel:
        """`model` with the adapter of a folder (or Hub id) that Topwork or peft wrote."""
        folder = hub.resolve(name_or_path, want=("adapter",), **where).folder
        peft_model = cls(model, LoraConfig.from_pretrained(folder), adapter_name)
        peft_model._fill(folder, adapter_name)
        if not is_trainable:
            peft_model.requires_grad_(False)
        return peft_model.eval()

    def load_adapter(self, folder: str | Path, adapter_name: str) -> None:
        """Add the adapter of `folder` under `adapter_name`; it does not become active."""
        self.add_adapter(adapter_name, LoraConfig.from_pretrained(folder))
        self._fill(Path(folder), adapter_name)

    @torch.no_grad()
    def _fill(self, folder: Path, name: str) -> None:
        path = folder / WEIGHTS
        try:
            given = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        wanted = self.adapter_state(name)
        missing, unexpected = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
        wrong = [
            f"{k} {list(given[k].shape)} in the file, {list(wanted[k].shape)} here"
            for k in sorted(set(given) & set(wanted))
            if given[k].shape != wanted[k].shape
        ]
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        problems = [f"{what}: {', '.join(names[:20])}" for what, names in parts if names]
        if problems:
            raise CheckpointError(f"{path}: does not fit this model: " + "; ".join(problems))
        for key, tensor in given.items():
            wanted[key].copy_(tensor)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that ends `path` (or, with ^, starts it), else `default`."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
