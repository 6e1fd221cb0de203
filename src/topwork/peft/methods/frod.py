"""FRoD (doi:10.1609/aaai.v40i31.39813): W = U (Λ + S) Vᵀ, V shared by the layers of one role in
their blocks, U and Λ from W; trained are Λ and a sparse S off the diagonal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.config import LayerConfig, a_share, one_of
from topwork.peft.graft import Graft
from topwork.peft.sites import Site
from topwork.peft.targets import base_of

PARTS = ("frod_V", "frod_s_indices", "frod_s_size")
"""What a file holds of each role, as `frod_V.ROLE`."""


@dataclass(kw_only=True)
class FrodConfig(LayerConfig):
    """U (Λ + S) Vᵀ in place of W."""

    projection_prng_key: int = 0
    """The seed of the places of S."""
    save_projection: bool = True
    """Write V and the places with the adapter, rather than find them again from the base."""
    frod_dropout: float = 0.0
    """On the input of what is added to W."""
    bias: str = "none"
    init_weights: bool = True
    """Start at W itself; False: near it."""
    sparse_rate: float = 0.01
    """The share of entries that S has, off the diagonal."""
    regularization_alpha: float = 1e-3
    """Added to the diagonal where V is looked for, so that layers may be alike."""
    progressbar: bool = True
    """No effect."""
    runtime_offload_base_weight: bool = False
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "FROD"

    def __post_init__(self) -> None:
        super().__post_init__()
        a_share("frod_dropout", self.frod_dropout)
        one_of("bias", self.bias, ("none", "all", "frod_only"))
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"sparse_rate={self.sparse_rate} must be in [0, 1]")
        if self.regularization_alpha <= 0:
            raise ConfigError(f"regularization_alpha={self.regularization_alpha} must be positive")
        if self.runtime_offload_base_weight:
            raise ConfigError("runtime_offload_base_weight=True is refused: W stays where it is")

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In files the roles stand below one name."""
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name, _, role = key.rpartition(".")[2].partition("__")
            shared = name in PARTS and role
            found[key.removesuffix(f"{name}__{role}") + f"{name}.{role}" if shared else key] = (
                tensor
            )
        return found


class Frod(Graft):
    config: FrodConfig

    @classmethod
    def share_from(
        cls, config: FrodConfig, layers: list[tuple[str, Site]], model: nn.Module
    ) -> dict[str, Tensor]:
        """V and the places of S, for each role from the weights of all blocks."""
        weights: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for at, (path, _) in enumerate(layers):
            weight = sites.read_weight(base_of(model.get_submodule(path)))
            weights[role_of(path)][block_of(path, at)] = weight.detach().float().cpu()
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        made: dict[str, Tensor] = {}
        for role, of_block in sorted(weights.items()):
            found = [weight for _, weight in sorted(of_block.items())]
            width = found[0].shape[1]
            made[f"frod_V__{role}"] = common(found, config.regularization_alpha)
            made[f"frod_s_indices__{role}"] = places(width, config.sparse_rate, generator)
            made[f"frod_s_size__{role}"] = torch.tensor([width, width])
        return made

    def create(self) -> dict[str, Tensor | nn.Module]:
        self.role = role_of(self.path)
        left, scale = split(self.weight.cpu(), self.shared[f"frod_V__{self.role}"])
        values = torch.zeros(self.shared[f"frod_s_indices__{self.role}"].shape[1])
        if not self.config.init_weights:
            values.normal_(std=0.1)
            scale = scale + 0.1 * torch.randn_like(scale)
        to = self.layer.device
        return {
            "frod_lambda_l": nn.Parameter(scale.to(to)),
            "frod_lambda_s_values": nn.Parameter(values.to(to)),
            "frod_U": left.to(to),
        }

    def saved(self) -> Iterable[tuple[str, Tensor]]:
        """U follows from V and the base's weight."""
        return [(name, tensor) for name, tensor in super().saved() if name != "frod_U"]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, in], Λ + S [in, in] and V [in, in]."""
        scale, values = self["frod_lambda_l"], self["frod_lambda_s_values"]
        rows, columns = self.shared[f"frod_s_indices__{self.role}"].to(values.device)
        core = torch.diag(scale).index_put((rows, columns), values)
        return self["frod_U"], core, self.shared[f"frod_V__{self.role}"].to(values.device)

    def whole(self, x: Tensor) -> Tensor | None:
        """Without W, where nothing is dropped of the input."""
        if self.config.frod_dropout and self.layer.training:
            return None
        left, core, v = (m.to(x.dtype) for m in self._parts())
        return F.linear(x @ v @ core.t(), left, self.base.bias)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.config.frod_dropout, self.layer.training)
        return y + F.linear(x, self.delta().to(y.dtype))

    def delta(self) -> Tensor:
        left, core, v = self._parts()
        return left @ core @ v.t() - self.weight


def role_of(path: str) -> str:
    """What a layer is in its block: the last two parts of its path."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def block_of(path: str, otherwise: int) -> int:
    """The number of a layer's block: the one after `layers`, or the first in its path."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), otherwise)


def common(weights: list[Tensor], ridge: float) -> Tensor:
    """V [in, in] of several weights [out, in]: the higher-order GSVD of their stack, or its right
    singular vectors where it has fewer rows than columns."""
    stack = torch.cat(weights)
    if stack.shape[0] < stack.shape[1]:
        return torch.linalg.svd(stack, full_matrices=True)[2].t().contiguous()
    q, r = torch.linalg.qr(stack)
    eye = torch.eye(len(r))
    pieces = q.split([len(weight) for weight in weights])
    mean = torch.stack([torch.linalg.inv(p.t() @ p + ridge * eye) for p in pieces]).mean(0)
    return r.t() @ torch.linalg.eigh(mean).eigenvectors


def places(width: int, rate: float, generator: torch.Generator) -> Tensor:
    """Rows and columns [2, n] of `rate` of all entries, off the diagonal."""
    off = (~torch.eye(width, dtype=torch.bool)).nonzero()
    count = min(int(width * width * rate), len(off))
    count = max(1, count) if rate > 0 and len(off) else count
    if not count:
        return torch.empty(2, 0, dtype=torch.long)
    return off[torch.randperm(len(off), generator=generator)[:count]].t().contiguous()


def split(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U [out, in] with columns of length one and Λ [in], such that U Λ Vᵀ is the weight."""
    weight, v = weight.double(), v.double()
    try:
        product = torch.linalg.solve(v, weight.t()).t()
    except RuntimeError:  # V has no inverse
        product = weight @ torch.linalg.pinv(v, rtol=1e-6).t()
    scale = product.norm(dim=0)
    left = torch.where(scale > 1e-12, product / scale.clamp(min=1e-12), 0.0)
    return left.float(), scale.float()


CONFIG = FrodConfig
GRAFT = Frod
