"""AdaLoRA (arXiv:2303.10512): B diag(E) A, whose least important directions are switched off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class AdaLoraConfig(LayerConfig):
    """All layers start at rank `init_r`; by the end they have `target_r` on average."""

    r: int = 8
    """No effect; the rank is `init_r`."""
    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    total_step: int | None = None
    """How many steps the training has; needed to train."""
    tinit: int = 0
    """Steps at full rank."""
    tfinal: int = 0
    """Steps at the final ranks."""
    deltaT: int = 1  # noqa: N815
    """Steps between two reallocations."""
    beta1: float = 0.85
    """Smoothing of the importance."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    orth_reg_weight: float = 0.5
    """How much A's and B's distance from orthogonal counts in the loss."""
    rank_pattern: dict[str, list[bool]] | None = None
    """Which directions of each layer are on; written by the allocation."""
    bias: str = "none"
    init_lora_weights: bool = True
    """E starts at zero; False: all normal."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "ADALORA"
    ALSO_INERT = frozenset({"qalora_group_size", "use_rslora", "alpha_pattern"})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("init_r", self.init_r, 1)
        a_share("lora_dropout", self.lora_dropout)
        one_of("bias", self.bias, ("none", "all", "lora_only"))
        at_least("orth_reg_weight", self.orth_reg_weight, 0)
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if self.inference_mode:
            return
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of "
                f"total_step={self.total_step} to reallocate"
            )


class AdaLora(Graft):
    KINDS = ("linear", "conv")
    USUAL = usual.ADALORA
    config: AdaLoraConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.key = f"{self.path}.lora_E"
        self.importance: dict[str, tuple[Tensor, Tensor]] = {}
        alpha = self.config.lora_alpha
        self.scale = (alpha if alpha > 0 else self.config.init_r) / (self.config.init_r + 1e-5)

    def create(self) -> dict[str, Tensor | nn.Module]:
        kept = (self.config.rank_pattern or {}).get(self.key)
        r = self.config.init_r if kept is None else sum(kept)
        if self.site.groups > 1:
            raise ConfigError(f"ADALORA does not go to {self.path}, a convolution in groups")
        inputs = self.site.inputs * math.prod(self.site.kernel)
        a, b = self.empty(r, inputs), self.empty(self.site.outputs, r)
        e = self.empty(r, 1).normal_()
        for matrix in (a, b):
            matrix.normal_(std=0.02 if self.config.init_lora_weights else 1.0)
        if self.config.init_lora_weights:
            e.zero_()
        made = {"lora_A": a, "lora_B": b, "lora_E": e}
        return {name: nn.Parameter(tensor) for name, tensor in made.items()}

    def term(self) -> ops.LoraTerm:
        a = self["lora_A"] * self["lora_E"]
        return ops.LoraTerm(a, self["lora_B"], self.scale, self.config.lora_dropout)

    def delta(self) -> Tensor:
        product = self["lora_B"] @ (self["lora_A"] * self["lora_E"]) * self.scale
        return product.view(-1, self.site.inputs, *self.site.kernel)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return super().after(F.dropout(x, self.config.lora_dropout, self.layer.training), y)

    def saved(self) -> list[tuple[str, Tensor]]:
        kept = (self.config.rank_pattern or {}).get(self.key)
        held = list(super().saved())
        if kept is None or all(kept) or len(kept) != self["lora_E"].shape[0]:
            return held
        chosen = torch.tensor(kept, device=self["lora_E"].device)
        return [(n, t[:, chosen] if n == "lora_B" else t[chosen]) for n, t in held]

    @classmethod
    def penalty(cls, config: AdaLoraConfig, grafts: list[AdaLora]) -> Tensor | None:
        total: Tensor | None = None
        for graft in grafts:
            for gram in (
                graft["lora_A"] @ graft["lora_A"].t(),
                graft["lora_B"].t() @ graft["lora_B"],
            ):
                off = (gram - torch.eye(len(gram), device=gram.device)).norm()
                total = off if total is None else total + off
        return None if total is None else config.orth_reg_weight * total / (2 * len(grafts))

    # -- the allocation --------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def update_and_allocate(cls, config: AdaLoraConfig, grafts: list[AdaLora], step: int) -> None:
        """After the backward pass of `step`, and before the gradients are cleared."""
        if config.total_step is None:
            raise ConfigError("AdaLoRA needs total_step to be trained")
        last = config.total_step - config.tfinal
        if step > last:
            for graft in grafts:
                kept = torch.tensor((config.rank_pattern or {})[graft.key])
                graft._switch(kept.to(graft["lora_E"].device))
            return
        if step < last:
            for graft in grafts:
                graft._measure()
        if step == last or (step > config.tinit and step % config.deltaT == 0):
            allocate(config, grafts, budget(config, len(grafts), step))

    def _measure(self) -> None:
        """Update importance |w · ∂L/∂w| and its uncertainty, both smoothed."""
        b1, b2 = self.config.beta1, self.config.beta2
        for name in ("lora_A", "lora_B", "lora_E"):
            weight = self.parameter(name)
            if weight.grad is None:
                continue
            now = (weight * weight.grad).abs().float()
            mean, spread = self.importance.get(name, (torch.zeros_like(now), torch.zeros_like(now)))
            mean = b1 * mean + (1 - b1) * now
            self.importance[name] = (mean, b2 * spread + (1 - b2) * (now - mean).abs())

    def score(self) -> Tensor:
        """The importance [r] of each direction: its E, and the mean of its A and of its B."""
        held = (self.importance[name] for name in ("lora_A", "lora_B", "lora_E"))
        a, b, e = (mean * spread for mean, spread in held)
        return e[:, 0] + (a.mean(1) + b.mean(0))

    def _switch(self, kept: Tensor) -> None:
        self.parameter("lora_E").masked_fill_(~kept[:, None], 0.0)


def budget(config: AdaLoraConfig, layers: int, step: int) -> int:
    """How many directions stay on at `step`: a cubic descent from the first number to the last."""
    first, last = config.init_r * layers, config.target_r * layers
    end = (config.total_step or 0) - config.tfinal
    if step <= config.tinit:
        return first
    if step >= end and step != end:
        return last
    left = 1 - (step - config.tinit) / (end - config.tinit)
    return int((first - last) * left**3 + last)


def allocate(config: AdaLoraConfig, grafts: list[AdaLora], keep: int) -> None:
    """Switch off all but the `keep` most important directions of all layers together."""
    scores = [graft.score() for graft in grafts]
    every = torch.cat(scores)
    off = len(every) - keep
    limit = torch.kthvalue(every, off).values if off else every.min() - 1
    config.rank_pattern = {}
    for graft, score in zip(grafts, scores):
        kept = score > limit
        graft._switch(kept)
        config.rank_pattern[graft.key] = kept.tolist()


CONFIG = AdaLoraConfig
GRAFT = AdaLora
