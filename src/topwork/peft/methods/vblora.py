"""VB-LoRA (arXiv:2405.15179): LoRA's matrices are mixed from one bank of vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig, a_share, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.sites import Site

LOGITS, INDICES, SHARES = "vblora_logits", "_topk_indices", "_topk_weights"


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
    save_only_topk_weights: bool = False
    """Write the best vectors' numbers and shares alone; what is loaded has no others to train."""
    fan_in_fan_out: bool = False
    """No effect: whether a weight is stored [in, out] is seen from the layer."""
    peft_type: str = "VBLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        at_least("topk", self.topk, 1)
        a_share("vblora_dropout", self.vblora_dropout)
        one_of("bias", self.bias, ("none", "all", "vblora_only"))

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.save_only_topk_weights:
            return tensors
        sizes = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32}
        dtype = next((d for most, d in sizes.items() if self.num_vectors < most), torch.int64)
        made: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if LOGITS not in key:
                made[key] = tensor
                continue
            best, which = tensor.detach().topk(self.topk, dim=-1)
            made[key + INDICES] = which.to(dtype)
            made[key + SHARES] = best.softmax(-1)[..., :-1].contiguous()  # they sum to one
        return made

    def from_file(self, tensors: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
        made = {k: t for k, t in tensors.items() if not k.endswith((INDICES, SHARES))}
        for key, which in tensors.items():
            if key.endswith(INDICES):
                name = key.removesuffix(INDICES)
                shares = tensors[name + SHARES]
                shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1).clamp(min=0)
                logits = shares.new_full((*which.shape[:-1], self.num_vectors), float("-inf"))
                made[name] = logits.scatter(-1, which.long(), shares.log())
        return made


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
