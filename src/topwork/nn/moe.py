"""Mixture of experts in place of an MLP: a router, stacked experts, perhaps a shared expert.

Letters: N tokens, C hidden size, E experts, k experts for each token, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.nn.layers import ACTIVATIONS, MlpSpec, activation, linears


class RouterSpec(Protocol):
    """How a token's experts and their weights follow from its logits.

    `corrected`: `choose` also gets a learned bias [E] that bears on the choice alone; `wide`: the
    logits are computed in fp32.
    """

    corrected: ClassVar[bool]
    wide: ClassVar[bool]

    @property
    def top_k(self) -> int: ...

    def choose(self, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        """weights [N, k] and experts [N, k] of `logits` [N, E]."""
        ...

    def reach(self, experts: int) -> int:
        """How many of the `experts` a token may choose from."""
        ...


@dataclass(frozen=True)
class SoftmaxRouter:
    """The k most probable experts, weighted by their probabilities, perhaps made to sum to one."""

    top_k: int
    normalised: bool = True
    corrected: ClassVar[bool] = False
    wide: ClassVar[bool] = False

    def choose(self, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, -1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def reach(self, experts: int) -> int:
        return experts


@dataclass(frozen=True)
class TopKSoftmaxRouter:
    """The k highest logits, and the softmax over them alone (gpt-oss, Granite)."""

    top_k: int
    corrected: ClassVar[bool] = False
    wide: ClassVar[bool] = False

    def choose(self, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        best, chosen = logits.topk(self.top_k, -1)
        return best.softmax(-1, dtype=torch.float32).to(logits.dtype), chosen

    def reach(self, experts: int) -> int:
        return experts


@dataclass(frozen=True)
class SigmoidRouter:
    """The k highest logits, each weighted by its sigmoid (Llama 4)."""

    top_k: int
    corrected: ClassVar[bool] = False
    wide: ClassVar[bool] = False

    def choose(self, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        best, chosen = logits.topk(self.top_k, -1)
        return best.float().sigmoid().to(logits.dtype), chosen

    def reach(self, experts: int) -> int:
        return experts


@dataclass(frozen=True)
class GroupedRouter:
    """DeepSeek-V3 (arXiv:2412.19437): sigmoid scores; a learned correction bears on the choice.

    Of `groups` groups of experts the `kept` with the best sum of their two best are considered.
    """

    top_k: int
    groups: int
    kept: int
    normalised: bool
    scale: float
    corrected: ClassVar[bool] = True
    wide: ClassVar[bool] = True

    def choose(self, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        rated = scores if correction is None else scores + correction
        by_group = rated.unflatten(-1, (self.groups, -1))  # [N, groups, E / groups]
        best = by_group.topk(2, -1).values.sum(-1).topk(self.kept, -1).indices
        open_ = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
        rated = by_group.masked_fill(~open_[..., None], float("-inf")).flatten(1)
        chosen = rated.topk(self.top_k, -1).indices
        weights = scores.gather(1, chosen)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def reach(self, experts: int) -> int:
        if experts % self.groups or experts // self.groups < 2 or self.kept > self.groups:
            raise ConfigError(
                f"{experts} experts cannot be chosen from the {self.kept} best of {self.groups} "
                "groups (n_group, topk_group): a group needs two experts at least"
            )
        return experts // self.groups * self.kept


@dataclass(frozen=True)
class ClampedGate:
    """gpt-oss's gate: (up + 1) · gate · σ(alpha · gate), both clamped, in alternating columns."""

    limit: float
    alpha: float


@dataclass(frozen=True)
class ExpertsSpec:
    """`count` gated MLPs in stacked weights [E, out, in], or, if `inward`, [E, in, out]."""

    count: int
    width: int
    activation: str = "silu"
    inward: bool = False
    bias: bool = False
    gate: ClampedGate | None = None

    def __post_init__(self) -> None:
        activation(self.activation, "hidden_act")


@dataclass(frozen=True)
class MoeSpec:
    """A router and its experts, under their names in the checkpoint.

    `shared`: an expert that sees every token, if `shared_gate` weighted by a sigmoid.
    `weigh_input`: the router's weights multiply what enters an expert, else what leaves it.
    """

    experts: ExpertsSpec
    router: RouterSpec
    router_name: str = "gate"
    router_bias: bool = False
    shared: MlpSpec | None = None
    shared_name: str = "shared_expert"
    shared_gate: bool = False
    weigh_input: bool = False

    def __post_init__(self) -> None:
        reach = self.router.reach(self.experts.count)
        if not 0 < self.router.top_k <= reach:
            raise ConfigError(
                f"num_experts_per_tok={self.router.top_k} must be from 1 to the {reach} experts "
                "that a token may choose from"
            )

    def build(self, hidden: int) -> Moe:
        return Moe(self, hidden)


class Router(nn.Module):
    """Logits [N, E] of tokens [N, C]."""

    def __init__(self, spec: MoeSpec, hidden: int) -> None:
        super().__init__()
        count = spec.experts.count
        self.wide = spec.router.wide
        self.weight = nn.Parameter(torch.empty(count, hidden))
        self.bias = nn.Parameter(torch.zeros(count)) if spec.router_bias else None
        if spec.router.corrected:
            self.register_buffer("e_score_correction_bias", torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        if self.wide:
            return F.linear(x.float(), self.weight.float(), self.bias)
        return F.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """All experts' weights, stacked."""

    def __init__(self, spec: ExpertsSpec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        shapes = {"gate_up_proj": (2 * spec.width, hidden), "down_proj": (hidden, spec.width)}
        for name, (out, inner) in shapes.items():
            size = (inner, out) if spec.inward else (out, inner)
            self.register_parameter(name, nn.Parameter(torch.empty(spec.count, *size)))
            if spec.bias:
                bias = nn.Parameter(torch.zeros(spec.count, out))
                self.register_parameter(f"{name}_bias", bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Rows [M, C] in groups of `counts`, one group for each expert → [M, C]."""
        inner = self._gated(self._linear("gate_up_proj", x, counts))
        return self._linear("down_proj", inner, counts)

    def _linear(self, name: str, x: Tensor, counts: list[int]) -> Tensor:
        weight = getattr(self, name)
        weight = weight if self.spec.inward else weight.transpose(1, 2)
        bias = getattr(self, f"{name}_bias") if self.spec.bias else None
        return ops.grouped_linear(x, weight, counts, bias)

    def _gated(self, x: Tensor) -> Tensor:
        if self.spec.gate is not None:
            limit, alpha = self.spec.gate.limit, self.spec.gate.alpha
            gate, up = x[..., 0::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
            return (up + 1) * gate * torch.sigmoid(gate * alpha)
        gate, up = x.chunk(2, -1)
        if self.activation is F.silu:
            return ops.swiglu(gate, up)
        return self.activation(gate) * up


class Moe(nn.Module):
    """The feed-forward part made of experts."""

    def __init__(self, spec: MoeSpec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.add_module(spec.router_name, Router(spec, hidden))
        self.experts = Experts(spec.experts, hidden)
        if spec.shared is not None:
            self.add_module(spec.shared_name, spec.shared.build(hidden))
            if spec.shared_gate:
                self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        spec, flat = self.spec, x.flatten(0, -2)
        router: Any = getattr(self, spec.router_name)
        correction = router.e_score_correction_bias if spec.router.corrected else None
        weights, chosen = spec.router.choose(router(flat), correction)
        y = ops.through_experts(
            flat, chosen, weights, spec.experts.count, self.experts, spec.weigh_input
        )
        if spec.shared is not None:
            shared = getattr(self, spec.shared_name)(flat)
            if spec.shared_gate:
                shared = torch.sigmoid(linears(flat, (self.shared_expert_gate,))[0]) * shared
            y = y + shared
        return y.view_as(x)


@dataclass(frozen=True)
class RouterLoss:
    """The weight of the routers' load-balancing loss beside the model's; `asked`: whether the
    configuration wants it in every loss of the model (output_router_logits)."""

    weight: float
    asked: bool = False


def balance(model: nn.Module, logits: Sequence[Tensor]) -> Tensor:
    """The load-balancing loss of `logits` [N, E], those of each router of `model` in one pass."""
    top_k = next(m.spec.router.top_k for m in model.modules() if isinstance(m, Moe))
    return ops.load_balancing_loss(logits, top_k)


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the list fills with the logits [N, E] of every router that computes."""
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, logits: Tensor) -> None:
        found.append(logits)

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Router)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
