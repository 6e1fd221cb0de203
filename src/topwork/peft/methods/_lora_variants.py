"""LoRA's variants on linears: other shapes of A and B, or something between them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.invocation import invoked
from topwork.peft.methods import _lora_init
from topwork.peft.methods._lora_options import VeloraConfig
from topwork.peft.methods.lora import Lora
from topwork.peft.tensors import Matrix


class QaLora(Lora):
    """QA-LoRA (arXiv:2309.14717): A sees the mean of each group of inputs, so that the change can
    be merged into the offsets of weights that are rounded in such groups."""

    KINDS = ("linear",)

    def create(self) -> dict[str, Tensor | nn.Module]:
        site, group = self.site, self.config.qalora_group_size
        if site.inputs % group:
            raise ConfigError(
                f"qalora_group_size={group} does not divide the {site.inputs} inputs of {self.path}"
            )
        a, b = self.empty(self.r, site.inputs // group), self.empty(site.outputs, self.r)
        _lora_init.start(a, b, self.config.init_lora_weights, self.r)
        return {"lora_A": Matrix(a), "lora_B": Matrix(b)}

    def matrices(self) -> tuple[Tensor, Tensor]:
        a, b = super().matrices()
        group = self.config.qalora_group_size
        return a.repeat_interleave(group, 1) * (a.shape[1] / group), b


class BdLora(Lora):
    """Block-diagonal A or B."""

    KINDS = ("linear",)

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, site, (n, m) = self.config.use_bdlora, self.site, self._blocks()
        assert config is not None
        if config.match_strict and n == m == 1 < config.nblocks:
            raise ConfigError(
                f"use_bdlora: {self.path} is neither in target_modules_bd_a nor in "
                "target_modules_bd_b; say match_strict=False if that is meant"
            )
        for sides, blocks in (((self.r, site.inputs), n), ((self.r, site.outputs), m)):
            if any(side % blocks for side in sides):
                raise ConfigError(f"use_bdlora: {blocks} blocks do not divide {sides}, {self.path}")
        a, b = self.empty(self.r, site.inputs // n), self.empty(site.outputs, self.r // m)
        _lora_init.start(a, b, self.config.init_lora_weights, self.r)
        return {"lora_A": Matrix(a), "lora_B": Matrix(b)}

    def _blocks(self) -> tuple[int, int]:
        """How many blocks A and B have."""
        config = self.config.use_bdlora
        assert config is not None
        of = (config.target_modules_bd_a, config.target_modules_bd_b)
        named = [any(part in self.path for part in names or []) for names in of]
        if all(named):
            raise ConfigError(f"use_bdlora: {self.path} is in both lists")
        return tuple(config.nblocks if one else 1 for one in named)  # type: ignore[return-value]

    def matrices(self) -> tuple[Tensor, Tensor]:
        pairs = zip(super().matrices(), self._blocks())
        a, b = (m if n == 1 else torch.block_diag(*m.chunk(n)) for m, n in pairs)
        return a, b


class Kasa(Lora):
    """KaSA: B diag(d) A, on a weight whose r least singular directions are taken out for good."""

    KINDS = ("linear",)

    def create(self) -> dict[str, Tensor | nn.Module]:
        made = super().create()
        weight = sites.read_weight(self.base)
        if self.r >= min(weight.shape):
            raise ConfigError(f"KaSA: r={self.r} leaves nothing of {self.path}, {weight.shape}")
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        sites.write_weight(self.base, (u[:, : -self.r] * s[: -self.r]) @ vh[: -self.r])
        return made | {"lora_diag": nn.Parameter(self.empty(self.r).normal_())}

    def matrices(self) -> tuple[Tensor, Tensor]:
        a, b = super().matrices()
        return a * self["lora_diag"][:, None], b

    @classmethod
    def penalty(cls, config: Any, grafts: list[Any]) -> Tensor | None:
        total: Tensor | None = None
        for graft in grafts:
            a, b, d = graft["lora_A"], graft["lora_B"], graft["lora_diag"]
            eye = torch.eye(len(d), device=d.device)
            off = (b.t() @ b - eye).norm() + (a @ a.t() - eye).norm()
            here = config.kasa_config.beta * d.square().sum() + config.kasa_config.gamma * off
            total = here if total is None else total + here
        return total


class Mica(Lora):
    """MiCA (arXiv:2604.01694): B is frozen at the weight's least left singular vectors."""

    KINDS = ("linear",)

    def trains(self, train: bool) -> None:
        super().trains(train)
        self.parameter("lora_B").requires_grad_(False)


class VeLora(Lora):
    """VeLoRA: what the gradient of A needs of the input is kept as projections on one vector."""

    KINDS = ("linear",)

    @property
    def options(self) -> VeloraConfig:
        assert self.config.velora_config is not None
        return self.config.velora_config

    def create(self) -> dict[str, Tensor | nn.Module]:
        width = math.ceil(self.site.inputs / self.options.num_groups)
        vector = self.empty(width).zero_()
        if self.options.init_type == "random":
            vector = F.normalize(vector.normal_(), dim=0)
        return super().create() | {"lora_velora_embed": vector}

    def term(self) -> ops.LoraTerm | None:
        return None if self.layer.training else super().term()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.matrices()
        x = F.dropout(x, self.dropout, self.layer.training)
        if self.layer.training and torch.is_grad_enabled():
            low = _Projected.apply(x, a.to(x.dtype), self._vector(x.detach()), self.options)
        else:
            low = F.linear(x, a.to(x.dtype))
        return y + F.linear(low, b.to(y.dtype)) * self.scale

    @torch.no_grad()
    def _vector(self, x: Tensor) -> Tensor:
        """The vector for the batch `x`, kept."""
        vector, how = self["lora_velora_embed"], self.options.init_type
        if how != "random":
            mean = pieces(x, self.options.num_groups).flatten(0, 1).mean(0).float()
            mean = F.normalize(torch.where(mean.any(), mean, torch.ones_like(mean)), dim=0)
            stays = vector.any() if how == "batch_average_once" else vector.new_zeros(()).bool()
            vector.copy_(torch.where(stays, vector, mean))
        return vector.clone()


def pieces(x: Tensor, groups: int) -> Tensor:
    """`x` [..., in] → [T, groups, width], filled up with zeros."""
    flat = x.reshape(-1, x.shape[-1])
    width = math.ceil(flat.shape[1] / groups)
    return F.pad(flat, (0, groups * width - flat.shape[1])).view(-1, groups, width)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, vector: Tensor, options: VeloraConfig) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(pieces(x, options.num_groups) @ vector.to(x.dtype), a, vector)
        ctx.scale = options.scale
        return F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        kept, a, vector = ctx.saved_tensors
        x = (kept[..., None] * vector.to(kept.dtype)).flatten(1)[:, : a.shape[1]] * ctx.scale
        da = dy.flatten(0, -2).t() @ x.to(dy.dtype) if ctx.needs_input_grad[1] else None
        return (dy @ a if ctx.needs_input_grad[0] else None), da, None, None


class ALora(Lora):
    """Activated LoRA (arXiv:2504.12397): it acts from the last `alora_invocation_tokens` of a row
    on, so what comes before has the base's keys and values."""

    KINDS = ("linear",)

    def term(self) -> ops.LoraTerm | None:
        return None

    def token_term(self) -> ops.LoraTerm | None:
        return super().term()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        on = invoked(self.name, y)[..., None]
        a, b = (m.to(y.dtype) for m in self.matrices())
        x = F.dropout(x, self.dropout, self.layer.training)
        term = F.linear(F.linear(x, a), b) * self.scale
        # Not times zero: a damaged adapter must leave alone what stands before its invocation.
        return y + torch.where(on, term, 0)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(f"{self.path}: aLoRA acts on some tokens only and cannot be merged")


def chosen(config: Any) -> type[Lora]:
    """The variant that `config` asks for."""
    from topwork.peft.methods._lora_arrow import ArrowLora
    from topwork.peft.methods._lora_monteclora import MonteClora

    by_option = {
        "use_qalora": QaLora, "use_bdlora": BdLora, "kasa_config": Kasa, "velora_config": VeLora,
        "alora_invocation_tokens": ALora, "arrow_config": ArrowLora,
        "monteclora_config": MonteClora,
    }  # fmt: skip
    for name, kind in by_option.items():
        if getattr(config, name):
            return kind
    return Mica if config.init_lora_weights == "mica" else Lora
