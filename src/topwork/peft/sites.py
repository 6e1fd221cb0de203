"""The layers that can carry an adapter, seen as one thing: a weight [out, in, *kernel].

A linear, transformers' Conv1D (a linear whose weight is stored [in, out]), a convolution and an
embedding (a linear of one-hot rows, stored [in, out]) differ only here. A quantised linear joins
by offering `dequantised_weight() -> [out, in]`, `set_weight(weight)` and `linear_parts()`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError

Kind = Literal["linear", "conv", "embedding", "multihead", "other"]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Site:
    """What a layer is to an adapter."""

    kind: Kind
    inputs: int = 0
    outputs: int = 0
    kernel: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    """The weight is stored [in, out]."""


def site_of(module: nn.Module) -> Site:
    """The site that `module` is; its kind is "other" when it has no weight of a known meaning."""
    if isinstance(module, CONVS):
        return Site(
            "conv", module.in_channels, module.out_channels, module.kernel_size, module.groups
        )
    if isinstance(module, nn.MultiheadAttention):
        return Site("multihead", module.embed_dim, 3 * module.embed_dim)
    if isinstance(module, nn.Embedding):
        return Site("embedding", module.num_embeddings, module.embedding_dim, transposed=True)
    if isinstance(module, nn.Linear) or hasattr(module, "dequantised_weight"):
        return Site("linear", int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        rows, columns = module.weight.shape  # type: ignore[union-attr]
        return Site("linear", int(rows), int(columns), transposed=True)
    return Site("other")


def read_weight(module: Any) -> Tensor:
    """The weight [out, in, *kernel] in its dtype, dequantised where it has to be."""
    if hasattr(module, "dequantised_weight"):
        return module.dequantised_weight()
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ConfigError(
            f"a {type(module).__name__} has no weight that an adapter could merge into"
        )
    return weight.t() if site_of(module).transposed else weight


@torch.no_grad()
def write_weight(module: Any, weight: Tensor) -> None:
    """Set the weight from one [out, in, *kernel]."""
    if hasattr(module, "set_weight"):
        module.set_weight(weight)
    else:
        module.weight.copy_(weight.t() if site_of(module).transposed else weight)


def kept_weight(module: Any) -> Tensor | nn.Module:
    """The weight to come back to: a copy, or where it is quantised a copy of the layer, since
    codes do not come back from values."""
    if hasattr(module, "dequantised_weight"):
        return copy.deepcopy(module)
    return read_weight(module).detach().clone()


@torch.no_grad()
def put_back(module: Any, kept: Tensor | nn.Module) -> None:
    """Set the weight to what `kept_weight` gave."""
    if isinstance(kept, Tensor):
        write_weight(module, kept)
    else:
        for name, tensor in kept.named_buffers():
            module.register_buffer(name, tensor)


def apply_weight(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """`x` through `weight` [out, in, *kernel] as `module` would put it through its own; no bias."""
    kind = site_of(module).kind
    if kind == "embedding":
        return F.embedding(x, weight.t(), module.padding_idx)
    weight = weight.to(x.dtype)
    if kind == "conv":
        return module._conv_forward(x, weight, None)
    return F.linear(x, weight)


def linear_parts(module: Any) -> ops.LinearParts | None:
    """What a linear without hooks computes, for `ops.lora_linears`; None for other modules."""
    if type(module) is nn.Linear:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return None if hooked else ops.LinearParts(module.weight, module.bias)
    tell = getattr(module, "linear_parts", None)
    return tell() if tell is not None else None


def per_output(vector: Tensor, y: Tensor, kind: Kind) -> Tensor:
    """`vector` [out] shaped to stand over the output `y` of a layer of `kind`, in its dtype."""
    vector = vector.to(y.dtype).flatten()
    if kind == "conv":
        batched = y.dim() - 2 if y.dim() > 2 else 1
        return vector.view(-1, *(1,) * batched)
    return vector


def refuse(method: str, path: str, module: nn.Module, kinds: tuple[Kind, ...]) -> None:
    """Raise ConfigError: `method` does not go to a layer of this kind."""
    raise ConfigError(
        f"{method} cannot go to {path} ({type(module).__name__}); it goes to {', '.join(kinds)}"
    )
