"""DEFT: what the weight puts into a few directions of the output is replaced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft


@dataclass(kw_only=True)
class DeftConfig(LayerConfig):
    """(I - Q Sᵀ) W + s · Q R, with Q = S from a QR of P, or Q = P and S = relu(P)."""

    r: int = 8
    decomposition_method: str = "relu"
    """"relu" or "qr"."""
    init_scale: float = 1.0
    alpha: float | None = None
    """s = alpha/r; None: 1."""
    para: bool = False
    """PaRa (arXiv:2406.05641): take the directions out and put nothing in."""
    deft_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    """Nothing changes at the start; False: R is random."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "DEFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("deft_dropout", self.deft_dropout)
        one_of("decomposition_method", self.decomposition_method, ("relu", "qr"))
        one_of("bias", self.bias, ("none", "all", "deft_only"))


class Deft(Graft):
    config: DeftConfig

    @property
    def r(self) -> int:
        return min(self.config.r, self.site.outputs)

    @property
    def scale(self) -> float:
        return self.config.alpha / self.r if self.config.alpha else 1.0

    def create(self) -> dict[str, Tensor | nn.Module]:
        p = self.empty(self.site.outputs, self.r).normal_(std=0.02)
        made: dict[str, Tensor | nn.Module] = {"deft_P": nn.Parameter(p)}
        if self.config.para:
            return made
        if self.config.init_weights:
            r = self._sides(p)[1].t() @ self.weight / self.scale
        else:
            r = self.empty(self.r, self.site.inputs).normal_(std=0.02 * self.config.init_scale)
        return made | {"deft_R": nn.Parameter(r)}

    def _sides(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Q and S [out, r]."""
        if self.config.decomposition_method == "relu":
            return p, p.relu()
        q, _ = torch.linalg.qr(p)
        return q, q

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        q, s = (m.to(y.dtype) for m in self._sides(self["deft_P"].float()))
        bias = getattr(self.base, "bias", None)
        low = -((y if bias is None else y - bias) @ s)
        if not self.config.para:
            x = F.dropout(x, self.config.deft_dropout, self.layer.training)
            low = low + F.linear(x, self["deft_R"].to(y.dtype)) * self.scale
        return y + low @ q.t()

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, s = self._sides(self["deft_P"].float())
        put = 0 if self.config.para else self["deft_R"].float() * self.scale
        return weight + q @ (put - s.t() @ weight), bias


CONFIG = DeftConfig
GRAFT = Deft
