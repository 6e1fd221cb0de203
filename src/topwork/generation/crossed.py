"""One token of each row through an encoder-decoder's decoder and head, as one native call.

`CompiledStep.of` reads the decoder's modules and the low-rank adapters that act in them; where they
are not of the kinds that `ops/native/crossed.c` knows it is None, and they are called themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from topwork.generation.program import UnknownError
from topwork.models.seq2seq import DecoderView, Seq2SeqModel
from topwork.models.stack import DecoderCache, Heads, Stack, StackBlock
from topwork.models.step import is_unwatched
from topwork.nn.cache import Growing
from topwork.nn.layers import ACTIVATIONS
from topwork.nn.norms import BiasedLayerNorm, RmsNorm
from topwork.nn.paths import part
from topwork.nn.relative import relative_bias
from topwork.ops.native import crossed
from topwork.ops.native.crossed import Means, Pair, Program, Sizes
from topwork.peft.layer import AdaptedLayer

LARGE = 2**20
"""Numbers in a head that is not read faster than it is screened."""


class CompiledStep:
    """A decoder's step over a cache, for rows that say one token each."""

    rows = crossed.MOST_ROWS

    def __init__(self, program: Program, cache: DecoderCache) -> None:
        self._program, self._cache = program, cache
        self._bound: Any = None
        self._judged = False  # whether a screen is worth its making
        told, (keys, _) = cache.told, cache.texts[0]
        lengths = torch.full(keys.shape[:1], keys.shape[1]) if told is None else told.sum(1)
        self._lengths = lengths.to(torch.int32)
        self._owner: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, view: DecoderView, cache: Any, room: int) -> CompiledStep | None:
        """For up to `room` tokens; None where a part is not of a kind that is known."""
        model, spec = view.model, view.model.spec
        if type(model).decode is not Seq2SeqModel.decode or model.training:
            return None
        if type(model).head is not Seq2SeqModel.head or not is_unwatched(model.decoder_stack):
            return None
        more = model.final_logits_bias[0] if spec.bias else None
        head = getattr(model, spec.head_name)
        return cls.over(model.decoder_stack, head, cache, room, spec.output_scale, more)

    @classmethod
    def over(
        cls, stack: Stack, head: nn.Module, cache: Any, room: int, scale: float = 1.0,
        more: Tensor | None = None,
    ) -> CompiledStep | None:  # fmt: skip
        """`head` reads the states of `stack` times `scale`, `more` [V] joins what it says."""
        if type(cache) is not DecoderCache or not crossed.ready():
            return None
        if not all(type(store) is Growing for store in cache.stores) or not _prefixes(cache.told):
            return None
        room += cache.virtual
        try:
            program = _written(stack, head, room, scale, more)
        except UnknownError:
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
        if not self._judged and len(ids) <= crossed.SCREENED:
            self._judged = True
            if self._worth_a_screen():
                program.screen()
        self._run(ids, False)
        if program.screened and program.tried > len(ids) * program.sizes.vocab // 8:
            program.screen(False)  # it leaves too many
        return program.best

    def _worth_a_screen(self) -> bool:
        """Whether a large head will be read so often that a copy of 8 bits pays."""
        program, size = self._program, self._program.sizes
        left = program.room - self._cache.stores[0].length
        return program.can_screen and size.vocab * size.hidden >= LARGE and left >= 16

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


def _known(fits: object, what: object) -> None:
    if not fits:
        raise UnknownError(str(what))


def _written(stack: Stack, head: Any, room: int, scale: float, more: Tensor | None) -> Program:
    spec, names = stack.spec, stack.spec.names
    words = part(stack, names.words)
    kinds = [n for n in crossed.ACTIVATIONS if ACTIVATIONS.get(n) is ACTIVATIONS[spec.activation]]
    _known(kinds, spec.activation)
    for module, kind in ((words, nn.Embedding), (head, nn.Linear)):
        _known(type(module) is kind and not _is_heard(module), module)
    sizes = Sizes(spec.hidden, spec.heads, spec.head_dim, spec.width, head.out_features)
    _known(sizes.fit(), sizes)
    paths = {"first": names.embedding_norm, "last": names.final_norm}
    ends = {name: _norm(part(stack, path)) for name, path in paths.items() if path is not None}
    layers = [_pairs(block) for block in stack.blocks]
    places = near = None
    if spec.places is not None:
        at, embed = torch.arange(min(room, spec.context or room)), part(stack, names.positions)
        places = embed(at).to(words.weight.dtype).contiguous()
        room = len(places)
    if spec.relative is not None:
        table = part(stack, spec.relative_path).weight
        near = relative_bias(table, -(-room // 16) * 16, 1, spec.relative[1], False)[:, :, 0]
        near = near.float().contiguous()
    ends["head"] = Pair(head.weight.detach(), head.bias)
    given = [t for pairs in (*layers, ends) for p in pairs.values() for t in (p.weight, p.bias)]
    _known(_alike([words.weight, more, *given]), "weights of several kinds")
    first = part(stack.blocks[0], names.norm)
    every = [part(block, path) for block in stack.blocks for path in _norms(block)]
    every += [part(stack, path) for path in paths.values() if path is not None]
    _known(all((type(n), n.eps) == (type(first), first.eps) for n in every), "several norms")
    means = Means(
        kinds[0], type(first) is BiasedLayerNorm, spec.norm_first, first.eps, spec.scale,
        spec.embedding_scale, scale,
    )  # fmt: skip
    return Program(
        sizes, means, layers, ends, words.weight, room, places=places, more=more, near=near
    )


def _norms(block: StackBlock) -> tuple[str, str, str]:
    names = block.spec.names
    return names.attention_norm, names.cross_norm, names.norm


def _pairs(block: Any) -> dict[str, Pair]:
    """The weights of a block by their names in the program."""
    names = block.spec.names
    for path in (names.attention, names.cross):
        _known(type(part(block, path)) is Heads, part(block, path))
    q, k, v, out = names.projections
    own, other = names.attention, names.cross
    paths = {
        "q": f"{own}.{q}", "k": f"{own}.{k}", "v": f"{own}.{v}", "out": f"{own}.{out}",
        "query": f"{other}.{q}", "cross_out": f"{other}.{out}",
        "gate": names.gate, "up": names.up, "down": names.down,
    }  # fmt: skip
    norms = {f"norm_{i}": _norm(part(block, path)) for i, path in enumerate(_norms(block))}
    linears = {name: _linear(part(block, p)) for name, p in paths.items() if p is not None}
    return {**norms, **linears}


def _norm(module: Any) -> Pair:
    _known(type(module) in (RmsNorm, BiasedLayerNorm), module)
    bias = getattr(module, "bias", None)
    return Pair(module.weight.detach(), None if bias is None else bias.detach())


def _linear(module: Any) -> Pair:
    """A linear, with the term of the adapter that acts in it."""
    base: Any = module.base_layer if isinstance(module, AdaptedLayer) else module
    _known(type(base) is nn.Linear and not _is_heard(base), base)
    pair = Pair(base.weight.detach(), None if base.bias is None else base.bias.detach())
    if base is module or module.disabled or module.merged:
        return pair
    names = [name for name in module.active if name in module.grafts]
    _known(module.rows is None and len(names) <= 1, names)
    if not names:
        return pair
    term = module.grafts[names[0]].term()
    _known(term is not None and len(term.a) <= crossed.MOST_RANK, names)
    assert term is not None
    dtype = pair.weight.dtype
    # Of the weights' precision, but read as fp32: they are small.
    a, b = (t.detach().to(dtype).float() for t in (term.a, term.b))
    return replace(pair, low=(a.contiguous(), b.t().contiguous(), float(term.scale)))


def _is_heard(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _alike(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are of one type that is known, whole, and on the CPU."""
    there = [t for t in tensors if t is not None]
    return there[0].dtype in (torch.float32, torch.bfloat16) and all(
        t.dtype is there[0].dtype and t.is_contiguous() and t.device.type == "cpu" for t in there
    )
