"""What a LoRA adapter may have besides its linears: stacked experts, token rows, layers again."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError, nearest
from topwork.peft.graft import Graft
from topwork.peft.methods import _lora_init
from topwork.peft.methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from topwork.peft.targets import base_of, by_pattern, ends, walk
from topwork.peft.tensors import Matrix


class ParameterLora(Graft):
    """scale · B A added to parameters of a module: matrices, or stacks of them [E, …] with an A and
    a B for each (`target_parameters`). In files a module's first parameter stands innermost."""

    KINDS = ("other", "linear", "embedding")
    BY_ROW = False

    @property
    def names(self) -> list[str]:
        return parameters_of(self.base, self.path, self.config)

    def create(self) -> dict[str, Tensor | nn.Module]:
        made: dict[str, Tensor | nn.Module] = {}
        for at, name in enumerate(self.names):
            stack, rows, columns = self._shape(name)
            r = self._rank(name) * stack
            a, b = self.empty(r, columns), self.empty(rows, r)
            _lora_init.start(a, b, self.config.init_lora_weights, self._rank(name))
            made |= {f"lora_A{at or ''}": Matrix(a), f"lora_B{at or ''}": Matrix(b)}
        return made

    def _shape(self, name: str) -> tuple[int, int, int]:
        """(experts, outputs, inputs) of a parameter."""
        shape = getattr(self.base, name).shape
        if len(shape) not in (2, 3):
            raise ConfigError(f"target_parameters: {self.path}.{name} has {len(shape)} dimensions")
        stack, rows, columns = (1, *shape) if len(shape) == 2 else shape
        return (stack, columns, rows) if self._inward(name) else (stack, rows, columns)

    def _inward(self, name: str) -> bool:
        """Whether a stack is stored [E, in, out]."""
        spec = getattr(self.base, "spec", None)
        inward = getattr(self.base, "is_transposed", getattr(spec, "inward", False))
        return bool(inward) and getattr(self.base, name).dim() == 3

    def _rank(self, name: str) -> int:
        return by_pattern(self.config.rank_pattern, f"{self.path}.{name}", self.config.r)

    def changes(self) -> dict[str, Tensor]:
        """What is added to each parameter, in its layout."""
        found = {}
        for at, name in enumerate(self.names):
            stack, r = self._shape(name)[0], self._rank(name)
            a = self[f"lora_A{at or ''}"].unflatten(0, (stack, r))
            b = self[f"lora_B{at or ''}"].unflatten(1, (r, stack)).permute(2, 0, 1)
            alpha = by_pattern(
                self.config.alpha_pattern, f"{self.path}.{name}", self.config.lora_alpha
            )
            scale = alpha / (r**0.5 if self.config.use_rslora else r)
            product = torch.bmm(b, a) * scale
            product = product.transpose(1, 2) if self._inward(name) else product
            found[name] = product.view(getattr(self.base, name).shape)
        return found

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def saved(self) -> list[tuple[str, Tensor]]:
        last = len(self.names) - 1
        renamed = []
        for key, tensor in self.layer.held(self.name):
            home, _, rest = key.partition(".")
            at = int(home[6:] or 0)
            renamed.append(("base_layer." * (last - at) + f"{home[:6]}.{rest}", tensor))
        return renamed


class MultiheadLora(Graft):
    """scale · B A on the stacked q, k and v of torch's MultiheadAttention, and another on its
    output projection: both are changed while it computes, for it calls no linear.

    peft puts the change into the output projection twice, and so its files are trained; here it
    counts twice too.
    """

    KINDS = ("multihead",)
    BY_ROW = False
    PLACES = (("in_proj_weight", "lora_", 1), ("out_proj.weight", "lora_out_", 2))

    def create(self) -> dict[str, Tensor | nn.Module]:
        config = self.config
        off = [n for n in ("use_dora", "lora_bias", "lora_dropout") if getattr(config, n)]
        off += (
            [] if config.init_lora_weights in (True, False, "gaussian") else ["init_lora_weights"]
        )
        if off:
            raise ConfigError(f"{self.path} is a MultiheadAttention: no {', '.join(off)} there")
        if self.base.in_proj_weight is None:
            raise ConfigError(f"{self.path}: keys and values of other widths than the queries")
        made: dict[str, Tensor | nn.Module] = {}
        for name, prefix, _ in self.PLACES:
            rows, columns = self.base.get_parameter(name).shape
            a, b = self.empty(self.r, columns), self.empty(rows, self.r)
            _lora_init.start(a, b, config.init_lora_weights, self.r)
            made |= {prefix + "A": Matrix(a), prefix + "B": Matrix(b)}
        return made

    @property
    def r(self) -> int:
        return by_pattern(self.config.rank_pattern, self.path, self.config.r)

    def changes(self) -> dict[str, Tensor]:
        alpha = by_pattern(self.config.alpha_pattern, self.path, self.config.lora_alpha)
        scale = alpha / (self.r**0.5 if self.config.use_rslora else self.r)
        return {
            name: self[prefix + "B"] @ self[prefix + "A"] * (scale * times)
            for name, prefix, times in self.PLACES
        }

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def saved(self) -> list[tuple[str, Tensor]]:
        return [
            (f"base_layer.out_proj.lora_{key[9:]}" if key.startswith("lora_out_") else key, tensor)
            for key, tensor in self.layer.held(self.name)
        ]


def parameters_of(module: nn.Module, path: str, config: Any) -> list[str]:
    """The module's own parameters that `target_parameters` names, in its order."""
    return [
        name
        for name, _ in module.named_parameters(recurse=False)
        if any(ends(f"{path}.{name}", entry) for entry in config.target_parameters or [])
    ]


class TokenRows(TrainableTokens):
    """Trainable tokens beside LoRA (`trainable_token_indices`)."""

    def saved(self) -> list[tuple[str, Tensor]]:
        return [(f"token_adapter.{key}", tensor) for key, tensor in self.layer.held(self.name)]


def besides(config: Any, model: nn.Module) -> list[tuple[str, type[Graft], Any]]:
    """(path, graft, configuration) of the parts that `config` asks for."""
    found: list[tuple[str, type[Graft], Any]] = []
    modules = {path: base_of(module) for path, module in walk(model)}
    for entry in config.target_parameters or []:
        name = entry.rpartition(".")[2]
        homes = [
            p for p, m in modules.items() if ends(f"{p}.{name}", entry) and name in m._parameters
        ]
        if not homes:
            names = {f"{p}.{n}" for p, m in modules.items() for n in m._parameters}
            short = {".".join(n.split(".")[-2:]) for n in names}
            raise ConfigError(
                f"target_parameters={entry!r} matches no parameter{nearest(entry, short)}"
            )
    if config.target_parameters:
        for path, module in modules.items():
            if parameters_of(module, path, config):
                found.append((path, ParameterLora, config))
    tokens = config.trainable_token_indices
    if tokens is not None and not isinstance(tokens, dict):
        bare = TrainableTokensConfig(token_indices=list(tokens))
        (entry,) = TrainableTokens.settle(bare, model).target_modules or ["embed_tokens"]
        tokens = {entry: tokens}
    for entry, indices in (tokens or {}).items():
        homes = [path for path in modules if ends(path, entry)]
        if not homes:
            raise ConfigError(f"trainable_token_indices: there is no module {entry!r}")
        own = TrainableTokensConfig(token_indices=list(indices), target_modules=homes)
        found += [(path, TokenRows, own) for path in homes]
    return found


def tied(config: Any, model: Any) -> Any:
    """`config` with the embedding in place of a head that is tied to it; the head follows."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or base_of(words).weight is not base_of(head).weight:
        return config
    there = [(path, base_of(module)) for path, module in walk(model)]
    embedding = next(path for path, m in there if m is base_of(words))
    above = next(path for path, m in there if m is base_of(head))
    named = config.target_modules
    if isinstance(named, str):
        if named != "all-linear" and re.fullmatch(named, above):
            raise ConfigError(
                f"target_modules={named!r} finds {above}, which is tied to {embedding}: name that"
            )
        return config
    kept = [entry for entry in named or [] if not ends(above, entry)]
    return replace(config, target_modules=kept if kept == named else [*kept, embedding])


def replicate(model: Any, ranges: list[Any]) -> None:
    """Build the stack of layers again out of `ranges` [start, end) of it; copies share weights
    (`layer_replication`, SOLAR's depth up-scaling, arXiv:2312.15166)."""
    owner, name, layers = _stack(model)
    for start, end in ranges:
        if not 0 <= start < end <= len(layers):
            raise ConfigError(f"layer_replication: [{start}, {end}) is no range of {len(layers)}")
    order = [i for start, end in ranges for i in range(start, end)]
    made = [_sharing(layers[i]) for i in order]
    for at, layer in enumerate(made):
        for module in layer.modules():
            for field in ("layer_idx", "layer"):
                if isinstance(getattr(module, field, None), int):
                    setattr(module, field, at)
    setattr(owner, name, nn.ModuleList(made))
    spec = getattr(owner, "spec", None)
    if hasattr(spec, "layers"):
        owner.spec = replace(spec, layers=tuple(spec.layers[i] for i in order))  # type: ignore[arg-type]
    config = model.config
    for field in ("num_hidden_layers", "n_layer"):
        if getattr(config, "__dict__", {}).get(field) is not None:
            setattr(config, field, len(made))
    if getattr(config, "__dict__", {}).get("layer_types"):
        config.layer_types = [config.layer_types[i] for i in order]


def _stack(model: nn.Module) -> tuple[Any, str, nn.ModuleList]:
    for module in model.modules():
        for name in ("layers", "h", "layer"):
            found = getattr(module, name, None)
            if isinstance(found, nn.ModuleList):
                return module, name, found
    raise ConfigError(f"layer_replication: {type(model).__name__} has no list of layers")


def _sharing(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors})
