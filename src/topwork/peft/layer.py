"""A leaf with adapters: a linear, transformers' Conv1D or an embedding, and its named terms."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft.config import LoraConfig


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "conv1d" (transformers' [in, out] linear), "embedding", or None."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


class LoraLayer(nn.Module):
    """`base_layer` plus Σ scale · B A over the active adapters. Names as in peft's state dict.

    The matrices are fp32 and compute in the base's dtype.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        kind = kind_of(base)
        if kind is None:
            raise ConfigError(f"{type(base).__name__} cannot carry a LoRA adapter")
        self.kind = kind
        self.base_layer = base
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.merged: list[str] = []
        self.disabled = False

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def add(self, name: str, config: LoraConfig, r: int, alpha: float) -> None:
        """Create the matrices of adapter `name`."""
        rows, columns = self.weight.shape
        if self.kind == "linear":
            rows, columns = columns, rows
        a = torch.empty(r, rows, device=self.weight.device)
        b = torch.zeros(columns, r, device=self.weight.device)
        if self.kind == "embedding":
            # As in peft: A starts at zero and B is random.
            a.zero_()
            b.normal_()
            if config.init_lora_weights is False:
                a.normal_()
            self.lora_embedding_A[name] = nn.Parameter(a)
            self.lora_embedding_B[name] = nn.Parameter(b)
        else:
            if config.init_lora_weights == "gaussian":
                a.normal_(std=1 / r)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            if config.init_lora_weights is False:
                nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            for home, matrix in ((self.lora_A, a), (self.lora_B, b)):
                leaf = nn.Linear(1, 1, bias=False)
                leaf.weight = nn.Parameter(matrix)
                leaf.out_features, leaf.in_features = matrix.shape
                home[name] = leaf
        self.scaling[name] = alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout[name] = config.lora_dropout

    def names(self) -> list[str]:
        return list(self.scaling)

    def remove(self, name: str) -> None:
        for home in (self.lora_A, self.lora_B, self.lora_embedding_A, self.lora_embedding_B):
            if name in home:
                del home[name]
        self.scaling.pop(name, None)
        self.dropout.pop(name, None)
        self.active = tuple(n for n in self.active if n != name)

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of adapter `name`."""
        if self.kind == "embedding":
            return self.lora_embedding_A[name], self.lora_embedding_B[name]
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def _using(self) -> list[str]:
        if self.disabled or self.merged:
            return []
        return [name for name in self.active if name in self.scaling]

    def _terms(self) -> tuple[ops.LoraTerm, ...]:
        return tuple(
            ops.LoraTerm(*self.matrices(name), self.scaling[name], self.dropout[name])
            for name in self._using()
        )

    def linear_parts(self) -> ops.LinearParts | None:
        """What this layer computes, so that a block can run several as one function."""
        if type(self.base_layer) is not nn.Linear:
            return None
        return ops.LinearParts(self.weight, self.bias, self._terms())

    def forward(self, x: Tensor) -> Tensor:
        parts = self.linear_parts()
        if parts is not None:
            return ops.lora_linears(x, (parts,), self.training)[0]
        y = self.base_layer(x)
        for term in self._terms():
            a, b = term.a.to(y.dtype), term.b.to(y.dtype)
            if self.kind == "embedding":
                y = y + F.embedding(x, a.t()) @ b.t() * term.scale
            else:
                y = y + F.dropout(x, term.dropout, self.training) @ a.t() @ b.t() * term.scale
        return y

    def delta(self, name: str) -> Tensor:
        """scale · B A in the layout of the base's weight, fp32."""
        a, b = self.matrices(name)
        product = (b.float() @ a.float()) * self.scaling[name]
        return product if self.kind == "linear" else product.t()

    @torch.no_grad()
    def merge(self, names: list[str], safe: bool) -> None:
        """Add the deltas of `names` to the base's weight."""
        chosen = [n for n in names if n in self.scaling and n not in self.merged]
        if not chosen:
            return
        merged = self.weight.float() + sum(self.delta(n) for n in chosen)
        if safe and not bool(merged.isfinite().all()):
            raise ConfigError(f"merging {chosen} gives values that are not finite; nothing merged")
        self.weight.copy_(merged)
        self.merged += chosen

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged deltas out again."""
        if self.merged:
            self.weight.copy_(self.weight.float() - sum(self.delta(n) for n in self.merged))
            self.merged = []


class SavedModule(nn.Module):
    """A module that is trained whole, one copy per adapter (`modules_to_save`)."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.disabled = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.active:
            if name in self.modules_to_save and not self.disabled:
                return self.modules_to_save[name](*args, **kwargs)
        return self.original_module(*args, **kwargs)
