"""OSF (arXiv:2504.07097): a weight's largest singular directions stay, and what is trained of the
others moves at right angles to them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig
from topwork.peft.graft import Graft

Rank = int | float


@dataclass(kw_only=True)
class OSFConfig(LayerConfig):
    """W = U₁ S₁ V₁ + U₂ S₂ V₂, of which the second part is trained.

    Without `target_modules` a family that has no usual ones is adapted in all linears.
    """

    effective_rank: Rank | None = None
    """How many directions stay, or (in (0, 1]) which share of them; None: half."""
    rank_pattern: dict[str, Rank] | None = None
    """Regular expression found in a layer's path → its `effective_rank`."""
    init_weights: bool | None = True
    """Start at the weight's own parts; False: at random."""
    target_svd_config: dict[str, int] | None = None
    """Without effect, as in peft."""
    peft_type: str = "OSF"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {"effective_rank": self.effective_rank, **(self.rank_pattern or {})}
        for name, rank in ranks.items():
            if rank is not None and rank <= 0:
                raise ConfigError(f"OSF: {name}={rank} must be positive")


class Parts(nn.Module):
    """The trained part [out, k], [k], [k, in] under its names in files."""

    def __init__(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        super().__init__()
        self.U_low, self.S_low, self.V_low = (nn.Parameter(part.clone()) for part in (u, s, v))


class Osf(Graft):
    USUAL: ClassVar[dict[str, Any]] = usual.OSF
    config: OSFConfig

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if config.target_modules is None and kind not in cls.USUAL:
            return replace(config, target_modules="all-linear")
        return super().settle(config, model)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rank = self._rank()
        self._held: tuple[Tensor, ...] = ()

    def _rank(self) -> int:
        least, rank = min(self.site.inputs, self.site.outputs), self.config.effective_rank
        for pattern, own in (self.config.rank_pattern or {}).items():
            if re.search(pattern, self.path):
                rank = own
                break
        if rank is None:
            return least // 2
        share = isinstance(rank, float) and rank <= 1
        return min(int(least * rank) if share else int(rank), least)

    @torch.no_grad()
    def create(self) -> dict[str, Tensor | nn.Module]:
        k, (out, inputs) = self.rank, (self.site.outputs, self.site.inputs)
        if not 0 < k < min(out, inputs):
            raise ConfigError(
                f"OSF: {k} of {min(out, inputs)} directions of {self.path} would stay; choose an "
                "effective_rank between, or leave the layer out"
            )
        u, s, v = torch.linalg.svd(self.weight, full_matrices=False)
        low = u[:, k:].contiguous(), s[k:].contiguous(), v[k:].contiguous()
        # Of a square factor the trained columns span all that is at right angles to the others,
        # so that nothing more need be kept.
        beside_u = low[0] if out <= inputs else u[:, :k].contiguous()
        beside_v = low[2] if inputs <= out else v[:k].contiguous()
        self._held = (*low, beside_u, beside_v)
        start = low if self.config.init_weights is not False else [*map(torch.randn_like, low)]
        return {"osf_svd_params": Parts(*start)}

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A [2k, in] and B [out, 2k], whose product is the trained part less the first one."""
        first_u, first_s, first_v, beside_u, beside_v = (
            m.to(self.layer.device) for m in self._held
        )
        part: Any = self.layer.osf_svd_params[self.name]
        inside_u = self.site.outputs <= self.site.inputs
        inside_v = self.site.inputs <= self.site.outputs
        low_u, low_s, low_v = (m.float() for m in (part.U_low, part.S_low, part.V_low))
        u = _Aside.apply(low_u, beside_u, inside_u)
        v = _Aside.apply(low_v.t(), beside_v.t(), inside_v).t()
        return torch.cat([v, first_v]), torch.cat([u * low_s, -first_u * first_s], 1)

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), 1.0)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a


class _Aside(torch.autograd.Function):
    """`m` as it is; its gradient without what lies along the columns of `beside`, or (`inside`)
    only what lies along them."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, beside: Tensor, inside: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(beside)
        ctx.inside = inside
        return m.view_as(m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (beside,) = ctx.saved_tensors
        along = beside @ (beside.t() @ grad)
        return (along if ctx.inside else grad - along), None, None


CONFIG = OSFConfig
GRAFT = Osf
