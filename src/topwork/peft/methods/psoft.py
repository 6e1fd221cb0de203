"""PSOFT (arXiv:2505.11235): the weight's principal part is rotated within its own r directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class PsoftConfig(LayerConfig):
    """W + s · B (diag(b) R diag(a) - I) A with s · B A the weight's r leading directions."""

    r: int = 32
    psoft_alpha: int = 32
    """s = psoft_alpha/r."""
    psoft_dropout: float = 0.0
    ab_svd_init: str = "psoft_init"
    """Singular values: "psoft_init" with B, "pissa_init" half with either."""
    psoft_svd: str = "full"
    """"full", or "lowrank" by random projection."""
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    """Of the random projection."""
    psoft_orth: bool = True
    """R is a rotation; False: any matrix."""
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    """Take a rotation as a short series, which is nearly one."""
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    """The most that the series' matrix may measure."""
    init_weights: bool = True
    """R starts at the identity; False: near it."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "PSOFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("psoft_dropout", self.psoft_dropout)
        at_least("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 1)
        one_of("ab_svd_init", self.ab_svd_init, ("psoft_init", "pissa_init"))
        one_of("psoft_svd", self.psoft_svd, ("full", "lowrank"))


class Turn(nn.Module):
    """R's parameters under their names in files."""

    def __init__(self, weight: Tensor, b: Tensor | None, a: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.vector_b = None if b is None else nn.Parameter(b)
        self.vector_a = None if a is None else nn.Parameter(a)


class Psoft(Graft):
    config: PsoftConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = self.config.psoft_alpha / self.config.r
        self._held: tuple[Tensor, Tensor] | None = None

    def create(self) -> dict[str, Tensor | nn.Module]:
        r, config = self.config.r, self.config
        if r > min(self.site.inputs, self.site.outputs):
            raise ConfigError(f"PSOFT: r={r} is more than the sides of {self.path} allow")
        weight = self.empty(r * (r - 1) // 2).zero_() if config.psoft_orth else torch.eye(r)
        if not config.init_weights:
            weight = weight + torch.randn_like(weight) * 0.1
        b, a = (
            self.empty(r).fill_(1.0) if wanted else None
            for wanted in (config.psoft_mag_b, config.psoft_mag_a)
        )
        self._held = self._principal()
        return {"psoft_R": Turn(weight.to(self.layer.device), b, a)}

    @torch.no_grad()
    def _principal(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the weight as it was when the adapter came."""
        r, config = self.config.r, self.config
        if config.psoft_svd == "full":
            u, s, vh = torch.linalg.svd(self.weight, full_matrices=False)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(config.random_seed)
                u, s, v = torch.svd_lowrank(self.weight, r, niter=config.psoft_svd_lowrank_niter)
                vh = v.t()
        u, s, vh = u[:, :r], s[:r] / self.scale, vh[:r]
        if config.ab_svd_init == "psoft_init":
            return vh, u * s
        return s.sqrt()[:, None] * vh, u * s.sqrt()

    def _turn(self) -> Tensor:
        """diag(b) R diag(a)."""
        held: Any = self.layer.psoft_R[self.name]
        turn = rotation(held.weight, self.config) if self.config.psoft_orth else held.weight
        turn = turn if held.vector_b is None else held.vector_b[:, None] * turn
        return turn if held.vector_a is None else turn * held.vector_a

    def _matrices(self) -> tuple[Tensor, Tensor]:
        assert self._held is not None
        a, b = (m.to(self.layer.device) for m in self._held)
        turn = self._turn()
        return (turn - torch.eye(len(turn), device=turn.device)) @ a, b

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), self.scale, self.config.psoft_dropout)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a * self.scale


def rotation(entries: Tensor, config: PsoftConfig) -> Tensor:
    """(I + S)(I - S)⁻¹ of the skew-symmetric S with `entries` above its diagonal, or its series."""
    r = config.r
    rows, columns = torch.triu_indices(r, r, 1, device=entries.device)
    half = entries.new_zeros(r, r).index_put((rows, columns), entries)
    skew, eye = half - half.t(), torch.eye(r, device=entries.device)
    if not config.use_cayley_neumann:
        return torch.linalg.solve(eye - skew, eye + skew, left=False)
    most = config.cayley_neumann_eps
    if most is not None:
        size = skew.norm()
        skew = skew * torch.where(size > most, most / (size + 1e-12), torch.ones_like(size))
    terms = config.num_cayley_neumann_terms
    made, power = eye, skew
    if terms > 1:
        made = made + 2 * skew
    if terms > 2:
        power = skew @ skew
        made = made + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            made = made + 2 * power
        made = made + power @ skew
    return made


CONFIG = PsoftConfig
GRAFT = Psoft
