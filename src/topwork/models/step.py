"""One token of each row through a decoder's stack, its modules written down once per answer.

What the modules say of training, packing and adapters is looked at when a step is made, not at
every token of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.models.stack import DecoderCache, Stack, StackBlock
from topwork.nn.layers import ACTIVATIONS
from topwork.nn.paths import part
from topwork.ops.cross import one_query
from topwork.ops.few import LEAST
from topwork.ops.native import few


class Products:
    """Linears of one input, by the kernel for few rows where it serves."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.pairs = [(layer.weight, layer.bias) for layer in layers]
        self._native = few.Linears(self.pairs)
        self._large = all(weight.numel() >= LEAST for weight, _ in self.pairs)
        self._served: dict[tuple[torch.Size, torch.dtype], bool] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        kind = x.shape, x.dtype
        serves = self._served.get(kind)
        if serves is None:
            serves = self._large and all(few.serves(x, w, b) for w, b in self.pairs)
            self._served[kind] = serves
        return self._native(x) if serves else tuple(F.linear(x, w, b) for w, b in self.pairs)


@dataclass(frozen=True)
class Layer:
    """A block's norms and products in the order of their use."""

    norms: tuple[Any, Any, Any]
    qkv: Products
    out: Products
    query: Products
    cross_out: Products
    up: Products
    down: Products

    @classmethod
    def of(cls, block: StackBlock) -> Layer:
        names = block.spec.names
        q, k, v, out = names.projections
        own, other = part(block, names.attention), part(block, names.cross)
        wide = [names.up] if names.gate is None else [names.gate, names.up]
        return cls(
            tuple(part(block, n) for n in (names.attention_norm, names.cross_norm, names.norm)),
            Products([part(own, name) for name in (q, k, v)]),
            Products([part(own, out)]),
            Products([part(other, q)]),
            Products([part(other, out)]),
            Products([part(block, name) for name in wide]),
            Products([part(block, names.down)]),
        )


def is_unwatched(stack: Stack) -> bool:
    """Whether what a decoder's stack computes of a token can be computed beside its modules.

    Not where somebody listens to one of them, a gradient could be asked for, or types are chosen by
    torch (autocast).
    """
    spec = stack.spec
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if type(stack) is not Stack or not spec.crossed or stack.training or not spec.vocab:
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in stack.modules()):
        return False
    return all(type(block) is StackBlock for block in stack.blocks)


class StackStep:
    """What `stack` computes of one token per row, after those in a cache."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.spec = stack, stack.spec
        self.layers = [Layer.of(block) for block in stack.blocks]
        self.act = ACTIVATIONS[self.spec.activation]
        self._keep: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, stack: Stack) -> StackStep | None:
        """None where a module is not what the stack made, or it must be called as it is."""
        if not is_unwatched(stack):
            return None
        names = stack.spec.names
        paths = [f"{a}.{p}" for a in (names.attention, names.cross) for p in names.projections]
        paths += [path for path in (names.up, names.gate, names.down) if path is not None]
        linears = [part(block, path) for block in stack.blocks for path in paths]
        return cls(stack) if all(type(layer) is nn.Linear for layer in linears) else None

    def __call__(self, ids: Tensor, position: int, cache: DecoderCache) -> Tensor:
        """Hidden states [B, 1, C] of `ids` [B, 1] at `position`, which join the cache."""
        spec, stack = self.spec, self.stack
        x = part(stack, spec.names.words)(ids)
        if spec.embedding_scale != 1:
            x = x * spec.embedding_scale
        if spec.places is not None:
            at = torch.full((1, 1), position, device=ids.device)
            x = x + part(stack, spec.names.positions)(at).to(x.dtype)
        if spec.names.embedding_norm is not None:
            x = part(stack, spec.names.embedding_norm)(x)
        bias = stack.terms(position + 1, cache).bias
        if bias is not None:
            bias = bias[None, :, position : position + 1, : position + 1].to(x.dtype)
        hidden = self._hidden(cache, x.dtype)
        before = spec.norm_first
        for i, layer in enumerate(self.layers):
            first, second, third = layer.norms
            y = self._look(first(x) if before else x, layer, i, cache, bias)
            x = x + y if before else first(x + y)
            y = self._cross(second(x) if before else x, layer, cache.memory[i], hidden)
            x = x + y if before else second(x + y)
            y = self._feed(third(x) if before else x, layer)
            x = x + y if before else third(x + y)
        if spec.names.final_norm is not None:
            x = part(stack, spec.names.final_norm)(x)
        return x

    def _heads(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], self.spec.heads, -1)

    def _look(
        self, x: Tensor, layer: Layer, index: int, cache: DecoderCache, bias: Tensor | None
    ) -> Tensor:
        q, k, v = map(self._heads, layer.qkv(x))
        keys, values = cache.update(index, k, v)
        return layer.out(one_query(q, keys, values, self.spec.scale, bias))[0]

    def _cross(
        self, x: Tensor, layer: Layer, memory: tuple[Tensor, Tensor], hidden: Tensor | None
    ) -> Tensor:
        q = self._heads(layer.query(x)[0])
        return layer.cross_out(one_query(q, *memory, self.spec.scale, hidden))[0]

    def _feed(self, x: Tensor, layer: Layer) -> Tensor:
        found = layer.up(x)
        inner = self.act(found[0])
        return layer.down(inner if len(found) == 1 else inner * found[1])[0]

    def _hidden(self, cache: DecoderCache, dtype: torch.dtype) -> Tensor | None:
        """What hides the padding of the texts, added to scores [B, 1, 1, S]."""
        keep = cache.keep
        if keep is None:
            return None
        if self._keep is None or self._keep[0] is not keep:
            added = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
            added.masked_fill_(~keep, float("-inf"))
            self._keep = keep, added[:, None, None]
        return self._keep[1]
