"""LoRA (arXiv:2106.09685): W x + s · B A x, s = alpha/r; and DoRA (arXiv:2402.09353):
m ⊙ (W x + s · B A x) / ‖W + s · B A‖, the norm of each output's row taken as a constant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.methods import _lora_init, _lora_parts
from topwork.peft.methods._lora_options import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from topwork.peft.targets import base_of, by_pattern, sharing
from topwork.peft.tensors import Bare, Matrix

BIASES = ("none", "all", "lora_only")


@dataclass(kw_only=True)
class LoraConfig(LayerConfig):
    """LoRA and its kin: the sum of the frozen weight and a product of two thin matrices."""

    PARTS: ClassVar[dict[str, type]] = {
        "arrow_config": ArrowConfig,
        "corda_config": CordaConfig,
        "eva_config": EvaConfig,
        "kasa_config": KasaConfig,
        "lora_ga_config": LoraGAConfig,
        "monteclora_config": MontecloraConfig,
        "use_bdlora": BdLoraConfig,
        "velora_config": VeloraConfig,
    }
    STARTS: ClassVar[dict[str, str]] = {
        "corda": "corda_config",
        "eva": "eva_config",
        "loftq": "loftq_config",
        "lora_ga": "lora_ga_config",
    }
    """Starts that have options: the field of those."""
    VARIANTS: ClassVar[tuple[str, ...]] = (
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "kasa_config",
        "velora_config",
        "monteclora_config",
        "alora_invocation_tokens",
        "arrow_config",
    )
    """Options of which one excludes the others."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    """Dropout on the input of A."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    """Biases of the base that are trained too: "none", "all", "lora_only" (of adapted layers)."""
    use_rslora: bool = False
    """Scale by alpha/√r (arXiv:2312.03732)."""
    use_dora: bool = False
    lora_bias: bool = False
    """B has a bias."""
    init_lora_weights: bool | str = True
    """True: A uniform (Kaiming), B zero; "gaussian": A normal with 1/r; False: both random;
    "pissa", "pissa_niter_N" (arXiv:2404.02948), "olora" (arXiv:2406.01775), "orthogonal", "mica";
    from data, before or after: "eva", "corda", "lora_ga"; "loftq" for rounded weights."""
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    loftq_config: dict[str, Any] | LoftQConfig = field(default_factory=dict)
    use_qalora: bool = False
    """A sees means of `qalora_group_size` inputs (arXiv:2309.14717)."""
    qalora_group_size: int = 16
    use_bdlora: BdLoraConfig | None = None
    kasa_config: KasaConfig | None = None
    velora_config: VeloraConfig | None = None
    monteclora_config: MontecloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    """Act from the last place of these tokens in a row on (arXiv:2504.12397)."""
    arrow_config: ArrowConfig | None = None
    """Set by `create_arrow_model`."""
    ensure_weight_tying: bool = False
    """Let a head that is tied to the embedding follow the embedding's adapter (or its copy in
    modules_to_save)."""
    target_parameters: list[str] | None = None
    """Parameters by the last parts of their path, where experts' weights are stacked in one."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the embedding (or of the modules named) that are trained beside it."""
    layer_replication: list[Any] | None = None
    """Ranges [start, end) of which the stack of layers is built anew, over the same weights."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "LORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("lora_dropout", self.lora_dropout)
        one_of("bias", self.bias, BIASES)
        _lora_init.check(self)
        on = [name for name in (*self.VARIANTS, "lora_bias") if getattr(self, name)]
        if len(on) > 1:
            raise ConfigError(f"{' and '.join(on)} exclude each other")
        if self.ensure_weight_tying and on:
            raise ConfigError(f"ensure_weight_tying does not go with {on[0]}")
        if self.target_parameters:
            off = [n for n in ("lora_dropout", *on) if getattr(self, n)]
            if off:
                raise ConfigError(f"target_parameters do not go with {', '.join(off)}")


def scale_at(config: LoraConfig, path: str) -> float:
    """By what B A counts on the layer at `path`: alpha/r or alpha/√r."""
    r = by_pattern(config.rank_pattern, path, config.r)
    alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


class Lora(Graft):
    """scale · B A, A [r, in], B [out, r]."""

    KINDS = ("linear", "conv", "embedding", "multihead")
    SHOWN: ClassVar[dict[str, str]] = {
        "r": "r",
        "scaling": "scale",
        "lora_alpha": "config.lora_alpha",
        "use_rslora": "config.use_rslora",
        "use_dora": "config.use_dora",
        "lora_bias": "config.lora_bias",
    }
    config: LoraConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.r = by_pattern(self.config.rank_pattern, self.path, self.config.r)
        self.scale = self.scale_of(self.config)
        self.dropout = self.config.lora_dropout
        self._norm: tuple[Any, Tensor] | None = None
        prefix = "lora_embedding_" if self.site.kind == "embedding" else "lora_"
        self.names = (prefix + "A", prefix + "B")

    @classmethod
    def settle(cls, config: LoraConfig, model: nn.Module) -> LoraConfig:
        if config.layer_replication:
            _lora_parts.replicate(model, config.layer_replication)
        if config.target_parameters and config.target_modules is None:
            return replace(config, target_modules=[])
        config = super().settle(config, model)
        return _lora_parts.tied(config, model) if config.ensure_weight_tying else config

    @classmethod
    def companions(cls, config: Any, model: nn.Module, paths: list[str]) -> dict[str, str]:
        """A head that is tied to a targeted embedding, where it shall follow."""
        words = [
            p for p in paths if sites.site_of(base_of(model.get_submodule(p))).kind == "embedding"
        ]
        return sharing(model, words) if config.ensure_weight_tying else {}

    @classmethod
    def besides(cls, config: Any, model: nn.Module) -> list[tuple[str, type[Graft], Any]]:
        return _lora_parts.besides(config, model)

    @classmethod
    def of(cls, config: LoraConfig, site: sites.Site) -> type[Graft]:
        from topwork.peft.methods import _lora_variants

        kind = _lora_variants.chosen(config)
        return _lora_parts.MultiheadLora if site.kind == "multihead" and kind is Lora else kind

    def scale_of(self, config: LoraConfig) -> float:
        """By what B A counts on this layer."""
        return scale_at(config, self.path)

    def create(self) -> dict[str, Tensor | nn.Module]:
        site = self.site
        made: dict[str, Tensor | nn.Module]
        a, b = _lora_init.matrices(self)
        if self.r % site.groups:
            raise ConfigError(f"{self.path} has {site.groups} groups, which r={self.r} is not of")
        if site.kind == "conv":
            a = a.view(self.r, site.inputs, *site.kernel)
            b = b[:, : self.r // site.groups].reshape(site.outputs, -1, *(1,) * len(site.kernel))
        bias = self.empty(site.outputs).zero_() if self.config.lora_bias else None
        if site.kind == "embedding":
            if bias is not None:
                raise ConfigError(f"lora_bias=True does not go to the embedding {self.path}")
            made = {name: nn.Parameter(m) for name, m in zip(self.names, (a, b))}
        else:
            made = {"lora_A": Matrix(a), "lora_B": Matrix(b, bias)}
        if self.config.use_dora:
            magnitude = self.norm_of(a, b).to(torch.float32)
            if site.kind == "conv":
                magnitude = magnitude.view(1, -1, *(1,) * len(site.kernel))
            made["lora_magnitude_vector"] = Bare(magnitude)
        return made

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, in, *kernel] and B [out, r, …]."""
        if self.owner is not None:
            b, a = (self.parameter(f"lora_embedding_{name}") for name in "AB")
            return a.t(), b.t()
        return self.parameter(self.names[0]), self.parameter(self.names[1])

    @property
    def bias(self) -> Tensor | None:
        bare = self.site.kind == "embedding" or self.owner is not None
        return None if bare else self.layer.lora_B[self.name].bias

    def saved(self) -> Iterable[tuple[str, Tensor]]:
        if self.owner is None:
            return super().saved()
        return zip(("lora_A.weight", "lora_B.weight"), self.matrices())

    def term(self) -> ops.LoraTerm | None:
        if self.config.use_dora or self.config.lora_bias or self.site.kind != "linear":
            return None
        return ops.LoraTerm(*self.matrices(), self.scale, self.dropout)

    def joined(self, parts: ops.LinearParts) -> ops.LinearParts | None:
        """DoRA: the term, and the gain on the sum; alone on its layer."""
        if not self.config.use_dora:
            return super().joined(parts)
        if parts.terms or parts.gain is not None or self.config.lora_bias:
            return None
        a, b = self.matrices()
        gain = self["lora_magnitude_vector"].flatten() / self.norm_of(a, b)
        return replace(parts, terms=(ops.LoraTerm(a, b, self.scale, self.dropout),), gain=gain)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (m.to(y.dtype) for m in self.matrices())
        bias = None if self.bias is None else self.bias.to(y.dtype)
        if self.site.kind != "embedding":
            x = F.dropout(x, self.dropout, self.layer.training)
        if self.site.kind == "conv":
            base = self.base
            conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.site.kernel) - 1]
            low = conv(x, a, None, base.stride, base.padding, base.dilation)
            term = conv(low, b, bias, groups=self.site.groups) * self.scale
        else:
            term = F.linear(sites.apply_weight(self.base, x, a), b, bias) * self.scale
        if not self.config.use_dora:
            return y + term
        own = getattr(self.base, "bias", None)
        gain = self.over(
            self["lora_magnitude_vector"].flatten() / self.norm_of(*self.matrices()), y
        )
        if own is None:
            return (y + term) * gain
        own = self.over(own, y)
        return (y - own + term) * gain + own

    def beside(self, x: Tensor, y: Tensor, first: Tensor) -> Tensor:
        """Several DoRA adapters add up, each to the layer as it is without any."""
        if not self.config.use_dora or y is first:
            return self.after(x, y)
        return y + self.after(x, first) - first

    def merged_beside(
        self, weight: Tensor, bias: Tensor | None, first: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        made, shifted = self.merged(first if self.config.use_dora else weight, bias)
        return (weight + made - first if self.config.use_dora else made), shifted

    def norm_of(self, a: Tensor, b: Tensor) -> Tensor:
        """‖W + s · B A‖ [out] of each output; ‖W‖² is kept, for W is frozen."""
        with torch.no_grad():
            weight = sites.read_weight(self.base)
            a, b = a.detach().float().flatten(1), b.detach().float().flatten(1)
            if self.site.groups > 1:  # the change is no weight of this shape: peft's reading of it
                added = (b.reshape(-1, self.r) @ a).reshape(weight.shape)
                return (weight.float() + self.scale * added).flatten(1).norm(dim=1)
            return ops.row_norms(weight.flatten(1), a, b, self.scale, self._own_norm(weight))

    def _own_norm(self, weight: Tensor) -> Tensor:
        """‖W‖² [out], kept while the weight stays; a compiled graph cannot ask whether it did."""
        if torch.compiler.is_compiling():
            return weight.float().flatten(1).square().sum(1)
        key = (weight.data_ptr(), weight._version, weight.device)
        if self._norm is None or self._norm[0] != key:
            self._norm = (key, weight.float().flatten(1).square().sum(1))
        return self._norm[1]

    def delta(self) -> Tensor:
        if self.site.groups > 1:
            raise ConfigError(
                f"{self.path} is a convolution in groups: its adapter mixes all channels, so it "
                "is no change of the weight and cannot be merged"
            )
        a, b = (m.float() for m in self.matrices())
        product = b.flatten(1) @ a.flatten(1) * self.scale
        return product.view(self.site.outputs, self.site.inputs, *self.site.kernel)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = weight + self.delta()
        if self.config.use_dora:
            norm = weight.flatten(1).norm(dim=1)
            gain = self["lora_magnitude_vector"].float().flatten() / norm
            weight = weight * gain.view(-1, *(1,) * (weight.dim() - 1))
        if self.bias is not None:
            if bias is None:
                raise ConfigError(
                    f"{self.path} has no bias that the one of lora_bias=True could be merged into"
                )
            bias = bias + self.bias.float() * self.scale
        return weight, bias


CONFIG = LoraConfig
GRAFT = Lora
