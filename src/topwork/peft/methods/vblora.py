"""VB-LoRA (arXiv:2405.15179): LoRA's matrices are mixed from one bank of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.layer import Graft
from topwork.peft.sites import Site


@dataclass(kw_only=True)
class VBLoRAConfig(LayerConfig):
    """Each piece of A and B is a softmax mixture of the `topk` best vectors of the bank."""

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    """Must divide the sides of every layer."""
    topk: int = 2
    vblora_dropout: float = 0.0
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "VBLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("topk", self.topk, 1)
        a_share("vblora_dropout", self.vblora_dropout)
        one_of("bias", self.bias, ("none", "all", "vblora_only"))


class VBLora(Graft):
    USUAL = usual.VBLORA
    config: VBLoRAConfig

    @classmethod
    def share(cls, config: VBLoRAConfig, layers: list[tuple[str, Site]]) -> dict[str, Tensor]:
        for path, site in layers:
            if site.inputs % config.vector_length or site.outputs % config.vector_length:
                raise ConfigError(
                    f"vector_length={config.vector_length} does not divide the sides "
                    f"{site.inputs} and {site.outputs} of {path}"
                )
        bound = config.init_vector_bank_bound
        bank = torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound)
        return {"vblora_vector_bank": nn.Parameter(bank)}

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, site = self.config, self.site
        pieces_in = site.inputs // config.vector_length
        pieces_out = site.outputs // config.vector_length
        a = self.empty(config.r, pieces_in, config.num_vectors).normal_(std=config.init_logits_std)
        b = self.empty(pieces_out, config.r, config.num_vectors).normal_(std=config.init_logits_std)
        return {"vblora_logits_A": nn.Parameter(a), "vblora_logits_B": nn.Parameter(b)}

    def _mixed(self, logits: Tensor) -> Tensor:
        best, which = logits.topk(self.config.topk, dim=-1)
        bank = self.shared["vblora_vector_bank"].to(logits.device)
        return (best.softmax(-1)[..., None] * bank[which]).sum(-2)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        a = self._mixed(self["vblora_logits_A"]).flatten(1)
        b = self._mixed(self["vblora_logits_B"]).transpose(1, 2).flatten(0, 1)
        return a, b

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), 1.0, self.config.vblora_dropout)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a


CONFIG = VBLoRAConfig
GRAFT = VBLora
