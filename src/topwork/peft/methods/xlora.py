"""X-LoRA (arXiv:2402.07148): trained LoRA adapters mixed by a classifier over hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from topwork import hub, ops
from topwork.errors import ConfigError
from topwork.peft import inject, scalings, state
from topwork.peft.config import PeftConfig, a_share, at_least
from topwork.peft.methods.lora import Lora, LoraConfig
from topwork.peft.prompts import NAMES, sizes_of


@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    """Which adapters, and the classifier that says by how much each counts."""

    hidden_size: int | None = None
    """None: the model's."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Name → folder or Hub id of a LoRA adapter."""
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    """A softmax over the scalings that `top_k_lora` leaves."""
    layerwise_scalings: bool = False
    """Scalings of their own for each adapted layer."""
    xlora_depth: int = 1
    """Layers of the classifier."""
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    """Train the adapters too; they are not written with the classifier."""
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    """Let only so many adapters count for a token."""
    scaling_pass_value: float = 0.0
    """No effect: the first pass goes through the bare model."""
    global_scaling_weight: float = 1.0
    """By what the scalings of the second pass are multiplied."""
    peft_type: str = "XLORA"

    @property
    def passes(self) -> int:
        return 2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("xlora_depth", self.xlora_depth, 1)
        at_least("xlora_size", self.xlora_size, 1)
        a_share("xlora_dropout_p", self.xlora_dropout_p)
        if self.top_k_lora is not None:
            at_least("top_k_lora", self.top_k_lora, 1)
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise ConfigError("enable_softmax_topk=True needs top_k_lora")


class Expert(Lora):
    """One of the adapters, counted by its scaling."""

    KINDS = ("linear", "embedding")
    at: int = 0
    """Which of the adapters."""
    depth: int = 0
    """Which of the adapted layers."""

    def term(self) -> ops.LoraTerm | None:
        return None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        added = super().after(x, torch.zeros_like(y))
        return y + added * scalings.scaling(self.depth, y)[..., self.at, None].to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(f"{self.path}: X-LoRA counts by token and cannot be merged")


def attach(home: Any, model: Any, name: str, config: XLoraConfig) -> XLoraConfig:
    """Put the adapters of `config` on the layers of `model`, and the classifier on `home`."""
    if not config.adapters:
        raise ConfigError("XLORA needs adapters: name → folder")
    if hasattr(home, state.ROUTER):
        raise ConfigError("there is an X-LoRA classifier already; a model has one")
    sizes = sizes_of(model)
    width = next((sizes[n] for n in NAMES["token_dim"] if sizes.get(n)), None)
    config = replace(config, hidden_size=config.hidden_size or width)
    if config.hidden_size is None:
        raise ConfigError("XLORA: the model does not say its hidden_size; give it")
    experts = {expert_of(name, key): path for key, path in config.adapters.items()}
    for expert, path in experts.items():
        _load(home, model, expert, path)
    layers = [la for la in inject.layers_of(model) if any(e in la.grafts for e in experts)]
    for depth, layer in enumerate(layers):
        for at, expert in enumerate(experts):
            plain = layer.grafts.get(expert)
            if plain is not None:
                made = Expert(layer, expert, plain.config, plain.path, plain.shared)
                made.at, made.depth = at, depth
                layer.grafts[expert] = made
    dtype, device = next((p.dtype, p.device) for p in model.parameters() if p.is_floating_point())
    router = scalings.Router(config, name, len(layers), dtype).to(device)
    home.add_module(state.ROUTER, router)
    return config


def detach(home: Any, name: str) -> None:
    """Take the classifier of the X-LoRA adapter `name` away."""
    if getattr(getattr(home, state.ROUTER, None), "owner", None) == name:
        delattr(home, state.ROUTER)


def expert_of(name: str, key: str) -> str:
    """What the adapter `key` of the X-LoRA adapter `name` is called on its layers."""
    return f"{name}_expert_{key}".replace(".", "_")


def experts_of(name: str, config: Any) -> tuple[str, ...]:
    """The adapters that are active when `name` is."""
    if not isinstance(config, XLoraConfig):
        return (name,)
    return tuple(expert_of(name, key) for key in config.adapters)


def train(home: Any, configs: dict[str, Any], active: tuple[str, ...], on: bool) -> None:
    """Train the classifier where it is active, and its adapters where that is wanted."""
    router = getattr(home, state.ROUTER, None)
    if router is None:
        return
    on = on and router.owner in active
    router.requires_grad_(on)
    experts = experts_of(router.owner, configs[router.owner])
    for graft in (g for expert in experts for g in inject.grafts_of(home, expert)):
        graft.trains(on and router.config.use_trainable_adapters)


def _load(home: Any, model: Any, name: str, path: str) -> None:
    folder = hub.resolve(path, want=("adapter",)).folder
    config: Any = LoraConfig.from_pretrained(folder)
    if any(getattr(config, option) for option in (*config.VARIANTS, "lora_bias")):
        raise ConfigError(f"X-LoRA mixes plain LoRA adapters, which {path} is not")
    config = inject.inject(model, name, config, home)
    wanted = {state.PREFIX + k: t for k, t in state.tensors_of(home, config, name).items()}
    state.fill(wanted, state.read(folder), str(state.weights_file(folder)))


CONFIG = XLoraConfig
