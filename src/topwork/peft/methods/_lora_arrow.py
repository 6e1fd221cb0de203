"""Arrow (arXiv:2405.11157) and GenKnowSub: each token is routed to the LoRA adapters of its layer
by its likeness to their first directions, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import inject
from topwork.peft.methods._lora_options import ArrowConfig
from topwork.peft.methods.lora import Lora, LoraConfig

ROUTER, TASK, GENERAL = "arrow_router", "task_", "gks_"
Pair = tuple[Tensor, Tensor]


class ArrowLora(Lora):
    """The mixture of the other LoRA adapters on the layer; its own A and B stand only in files."""

    KINDS = ("linear",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: tuple[Any, Tensor] | None = None

    @property
    def options(self) -> ArrowConfig:
        assert self.config.arrow_config is not None
        return self.config.arrow_config

    def term(self) -> ops.LoraTerm | None:
        return None

    def experts(self) -> list[Lora]:
        """The adapters that tokens are routed to."""
        general = self.options.gks_adapter_names or []
        found = (g for name, g in self.layer.grafts.items() if name not in general)
        experts = [g for g in found if isinstance(g, Lora) and not isinstance(g, ArrowLora)]
        if not experts:
            raise ConfigError(f"Arrow: there is no LoRA adapter to route to at {self.path}")
        return experts

    def pairs(self, experts: list[Lora]) -> list[Pair]:
        """A and B of each expert, less the mean of the general adapters' where that is wanted."""
        pairs = [expert.matrices() for expert in experts]
        names = self.options.gks_adapter_names if self.options.use_gks else None
        general = [self.layer.grafts[name].matrices() for name in names or []]  # type: ignore[attr-defined]
        if not general:
            return pairs
        mean = [torch.stack(side).mean(0) for side in zip(*general)]
        return [(a - mean[0], b - mean[1]) for a, b in pairs]

    @torch.no_grad()
    def directions(self, pairs: list[Pair]) -> Tensor:
        """The first right singular vector [experts, in] of each B A; kept until one changes."""
        if torch.compiler.is_compiling():
            return torch.stack([first_direction(a, b) for a, b in pairs])
        key = [(m.data_ptr(), m._version) for pair in pairs for m in pair]
        if self._held is None or self._held[0] != key:
            self._held = (key, torch.stack([first_direction(a, b) for a, b in pairs]))
        return self._held[1]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        experts = self.experts()
        pairs = self.pairs(experts)
        likeness = F.linear(x, self.directions(pairs).to(x.dtype)).abs().float()
        best = likeness.topk(min(self.options.top_k, len(experts)), -1)
        scores = torch.full_like(likeness, float("-inf")).scatter(-1, best.indices, best.values)
        shares = (scores / self.options.router_temperature).softmax(-1).to(y.dtype)
        added = torch.zeros_like(y)
        for at, (expert, (a, b)) in enumerate(zip(experts, pairs)):
            low = F.linear(x, a.to(y.dtype)) * (shares[..., at : at + 1] * expert.scale)
            added = added + F.linear(low, b.to(y.dtype))
        return y + F.dropout(added, self.dropout, self.layer.training)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(f"{self.path}: Arrow routes by token and cannot be merged")


def first_direction(a: Tensor, b: Tensor) -> Tensor:
    """The first right singular vector [in] of B A, without forming it."""
    q, right = torch.linalg.qr(a.float().t())
    _, left = torch.linalg.qr(b.float())
    _, _, vh = torch.linalg.svd(left @ right.t())
    return q @ vh[0]


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str | Path],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str | Path] | None = None,
    **where: Any,
) -> Any:
    """`base_model` with LoRA adapters of one shape, and Arrow's router over them active.

    `general_adapter_paths`: adapters whose mean is taken out of the others (`use_gks=True`).
    """
    from topwork.peft.model import PeftModel

    if not task_specific_adapter_paths:
        raise ConfigError("create_arrow_model needs at least one adapter")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("use_gks=True needs general_adapter_paths")
    general = general_adapter_paths if arrow_config.use_gks else None
    paths = {f"{TASK}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    paths |= {f"{GENERAL}{i}": path for i, path in enumerate(general or [])}
    first, *others = paths
    model = PeftModel.from_pretrained(base_model, paths[first], adapter_name=first, **where)
    for name in others:
        model.load_adapter(paths[name], adapter_name=name, **where)
    arrow_config.task_adapter_names = [name for name in paths if name.startswith(TASK)]
    arrow_config.gks_adapter_names = [name for name in paths if name.startswith(GENERAL)]
    shapes = {name: _shapes(model, name) for name in paths}
    for name in others:
        if shapes[name] != shapes[first]:
            raise ConfigError(f"Arrow: {paths[name]} has other layers or ranks than {paths[first]}")
    config = LoraConfig(
        arrow_config=arrow_config,
        target_modules=sorted(shapes[first]),
        r=next(iter(shapes[first].values()))[0][0],
    )
    model.add_adapter(ROUTER, config)
    model.set_adapter(ROUTER)
    return model


def _shapes(model: nn.Module, name: str) -> dict[str, tuple[torch.Size, torch.Size]]:
    found = {}
    for graft in inject.grafts_of(model, name):
        if not isinstance(graft, Lora) or graft.site.kind != "linear":
            raise ConfigError(f"Arrow: {name} at {graft.path} is not LoRA on a linear")
        a, b = graft.matrices()
        found[graft.path] = (a.shape, b.shape)
    return found
