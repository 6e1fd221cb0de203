"""One token of each row through an encoder-decoder's decoder and head, as one native call.

`CompiledStep.of` reads the decoder's modules; where they are not of the kinds that `crossed.c`
knows it is None, and they are called themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from topwork.models.stack import DecoderCache, Stack, StackBlock
from topwork.nn.cache import Growing
from topwork.nn.layers import ACTIVATIONS
from topwork.nn.norms import BiasedLayerNorm, RmsNorm
from topwork.nn.paths import part
from topwork.nn.relative import relative_bias
from topwork.ops.native import crossed
from topwork.ops.native.crossed import Means, Pair, Program, Sizes

LARGE = 2**20
"""Numbers in a head that is not read faster than it is screened."""


class CompiledStep:
    """A decoder's step over a cache, for rows that say one token each."""

    rows = crossed.MOST_ROWS

    def __init__(self, program: Program, cache: DecoderCache) -> None:
        self._program, self._cache = program, cache
        self._bound: Any = None
        self._greedy = 0
        told, (keys, _) = cache.told, cache.texts[0]
        lengths = torch.full(keys.shape[:1], keys.shape[1]) if told is None else told.sum(1)
        self._lengths = lengths.to(torch.int32)
        self._owner: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, stack: Stack, head: nn.Module, cache: Any, room: int, *, scale: float = 1.0,
        more: Tensor | None = None,
    ) -> CompiledStep | None:  # fmt: skip
        """For up to `room` tokens; None where a part is not of a kind that is known.

        `head` reads the states times `scale`, `more` [V] is added to what it says. Whether the
        modules are still what `stack` made is for `StackStep.of` to say.
        """
        if type(cache) is not DecoderCache or not crossed.ready():
            return None
        if not all(type(store) is Growing for store in cache.stores) or not _prefixes(cache.told):
            return None
        room += cache.virtual
        program = _written(stack, head, room, scale, more)
        if program is None:
            return None
        for store in cache.stores:
            store.reserve(room)  # type: ignore[attr-defined]
        return cls(program, cache)

    def takes(self, ids: Tensor, last: int) -> bool:
        """Whether it can read `ids` [B, T] next."""
        cache, (batch, new) = self._cache, ids.shape
        held: Any = cache.stores[0]
        if new != 1 or batch > self.rows or held.length >= self._program.room:
            return False
        return batch % len(cache.owner) == 0 and (
            held.buffers is None or len(held.buffers[0]) == batch
        )

    def step(self, ids: Tensor, last: int) -> Tensor:
        """Logits [B, 1, V] fp32 after `ids` [B, 1]; overwritten by the next."""
        return self._run(ids, True)[:, None]

    def greedy(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The values [B] and ids [B] of the largest logits after `ids` [B, 1]."""
        program = self._program
        self._run(ids, False)
        self._greedy += 1
        if self._greedy == 2 and len(ids) <= crossed.SCREENED and self._worth_a_screen():
            program.screen()
        elif program.screened and program.tried > len(ids) * program.sizes.vocab // 8:
            program.screen(False)  # it leaves too many
        return program.best

    def _worth_a_screen(self) -> bool:
        """Whether reading a large head in fp32 again and again is worth a copy of 8 bits."""
        program, size = self._program, self._program.sizes
        left = program.room - self._cache.stores[0].length
        return program.dtype is torch.float32 and size.vocab * size.hidden >= LARGE and left >= 16

    def _run(self, ids: Tensor, whole: bool) -> Tensor:
        cache = self._cache
        stores: Any = cache.stores
        cache.spread(len(ids))
        if self._bound is not stores[0].buffers or self._bound is None:
            self._bind(len(ids))
        if cache.origin is None:
            every = torch.arange(len(ids), dtype=torch.int32)[:, None]
            cache.origin = every.repeat(1, stores[0].buffers[0].shape[1])
        if self._owner is None or self._owner[0] is not cache.owner:
            self._owner = cache.owner, cache.owner.to(torch.int32)
        logits = self._program.run(
            ids.flatten().contiguous(), stores[0].length, cache.origin, self._owner[1],
            self._lengths, whole,
        )  # fmt: skip
        for store in stores:
            store.length += 1
        return logits

    def _bind(self, batch: int) -> None:
        cache, sizes = self._cache, self._program.sizes
        cache.settle()  # where rows come from was told of other stores
        stores: Any = cache.stores
        nothing = torch.empty(batch, 0, sizes.heads, sizes.size, dtype=self._program.dtype)
        for store in stores:
            if store.buffers is None:
                store.update(nothing, nothing)
        own = [_by_heads(store.buffers) for store in stores]
        texts = [_by_heads(pair) for pair in cache.texts]
        self._program.bind(own, texts)
        self._bound = stores[0].buffers


def _by_heads(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[B, T, H, D] as [B, H, T, D] in this order in memory."""
    k, v = (t.transpose(1, 2).contiguous() for t in pair)
    return k, v


def _prefixes(told: Tensor | None) -> bool:
    """Whether padding stands at the end alone."""
    return told is None or not bool((told[:, 1:] & ~told[:, :-1]).any())


def _written(
    stack: Stack, head: nn.Module, room: int, scale: float, more: Tensor | None
) -> Program | None:
    spec, names = stack.spec, stack.spec.names
    words = part(stack, names.words)
    kinds = [n for n in crossed.ACTIVATIONS if ACTIVATIONS.get(n) is ACTIVATIONS[spec.activation]]
    if type(words) is not nn.Embedding or type(head) is not nn.Linear or not kinds:
        return None
    sizes = Sizes(spec.hidden, spec.heads, spec.head_dim, spec.width, head.out_features)
    if words._forward_hooks or head._forward_hooks or head._forward_pre_hooks or not sizes.fit():
        return None
    norms = [part(block, n) for block in stack.blocks for n in _norms(block)]
    ends = {"first": names.embedding_norm, "last": names.final_norm}
    closing = {name: part(stack, path) for name, path in ends.items() if path is not None}
    every = [*norms, *closing.values()]
    if type(every[0]) not in (RmsNorm, BiasedLayerNorm):
        return None
    if any((type(n), n.eps) != (type(every[0]), every[0].eps) for n in every):
        return None
    layers = [_pairs(block) for block in stack.blocks]
    outer = {**{name: _pair(module) for name, module in closing.items()}, "head": _pair(head)}
    places = None
    if spec.places is not None:
        at = torch.arange(min(room, spec.context or room))
        places = part(stack, names.positions)(at).to(words.weight.dtype).contiguous()
        room = len(places)
    near = None
    if spec.relative is not None:
        table = part(stack, stack.spec.relative_path).weight
        near = relative_bias(table, -(-room // 16) * 16, 1, spec.relative[1], False)[:, :, 0]
        near = near.float().contiguous()
    given = [t for pairs in (*layers, outer) for pair in pairs.values() for t in pair]
    if not _alike([words.weight, more, *given]):
        return None
    means = Means(
        kinds[0], type(every[0]) is BiasedLayerNorm, spec.norm_first, every[0].eps, spec.scale,
        spec.embedding_scale, scale,
    )  # fmt: skip
    return Program(
        sizes, means, layers, outer, words.weight, room, places=places, more=more, near=near
    )


def _norms(block: StackBlock) -> tuple[str, str, str]:
    names = block.spec.names
    return names.attention_norm, names.cross_norm, names.norm


def _pairs(block: StackBlock) -> dict[str, Pair]:
    """The weights of a block by their names in the program."""
    names = block.spec.names
    q, k, v, out = names.projections
    own, other = names.attention, names.cross
    paths = {
        **{f"norm_{i}": path for i, path in enumerate(_norms(block))},
        "q": f"{own}.{q}", "k": f"{own}.{k}", "v": f"{own}.{v}", "out": f"{own}.{out}",
        "query": f"{other}.{q}", "cross_out": f"{other}.{out}",
        "gate": names.gate, "up": names.up, "down": names.down,
    }  # fmt: skip
    return {name: _pair(part(block, path)) for name, path in paths.items() if path is not None}


def _pair(module: Any) -> Pair:
    bias = getattr(module, "bias", None)
    return module.weight.detach(), None if bias is None else bias.detach()


def _alike(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are of one type that is known, whole, and on the CPU."""
    there = [t for t in tensors if t is not None]
    return there[0].dtype in (torch.float32, torch.bfloat16) and all(
        t.dtype is there[0].dtype and t.is_contiguous() and t.device.type == "cpu" for t in there
    )
