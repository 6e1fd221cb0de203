"""A model's step for a few rows as one native program, where the model is of a kind that it says.

`compile_step` reads a decoder's modules and writes down what they compute; what it does not know it
leaves to the modules themselves, by giving None. The weights are used where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.models.decoder import Block, Decoder, HeadSpec
from topwork.nn.cache import Growing, KVCache
from topwork.nn.layers import ACTIVATIONS, Attention, Mlp, PlainMlp, ScaledEmbedding
from topwork.nn.norms import (
    BiasedLayerNorm,
    L2Norm,
    LayerNorm,
    OffsetRmsNorm,
    PlainLayerNorm,
    RmsNorm,
    WideRmsNorm,
)
from topwork.nn.rotary import RotarySpec
from topwork.ops.native import decode
from topwork.ops.native.decode import Low, Program, Weight
from topwork.peft.layer import AdaptedLayer

LENGTH_DEPENDENT = ("dynamic", "longrope")
RMS_NORMS = (RmsNorm, WideRmsNorm, OffsetRmsNorm)
LAYER_NORMS = (LayerNorm, BiasedLayerNorm, PlainLayerNorm)


class UnknownError(Exception):
    """Something that the program has no words for."""


def _known(fits: object, what: object) -> None:
    if not fits:
        raise UnknownError(str(what))


@dataclass
class StepProgram:
    """A compiled step for up to `rows` rows at positions below `length`."""

    program: Program
    logits: Tensor  # [rows, V]
    best: Tensor  # [rows] int32: the first of each row's largest logits, and
    peak: Tensor  # [rows] fp32: what it is
    places: list[list[int]]  # per layer, what is bound to its keys and values
    shapes: list[tuple[int, int]]  # per layer, K and D
    head: HeadSpec
    coded: bool  # whether weights are quantised

    @property
    def rows(self) -> int:
        return self.program.rows

    def bind(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Use these keys and values, per layer [pages, size, K, D]; size is a multiple of 16.

        A layer's keys and values lie alike in memory, D in order.
        """
        for places, k, v in zip(self.places, keys, values):
            self.program.bind(places, k, v)

    def run(
        self, ids: Tensor, positions: Tensor, pages: Tensor, first: Tensor | None = None,
        adapter: Tensor | None = None, wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [wanted, V] bf16 of rows with `ids` and `positions` [R], and `best` and `peak`;
        overwritten by the next.

        `pages` [R, n] int32; `first` [R]: how many padding tokens stand before; `adapter` [R]: the
        index of each row's adapter (-1: none; by default the first); `wanted`: rows, by default
        all.
        """
        count = len(ids)
        zeros = torch.zeros(count, dtype=torch.int32)
        every = torch.arange(count, dtype=torch.int32)
        wanted = every if wanted is None else wanted
        self.program.run(
            ids.contiguous(),
            positions.contiguous(),
            pages,
            zeros if first is None else first,
            zeros if adapter is None else adapter,
            wanted,
        )
        logits, cap = self.logits[: len(wanted)], self.head.softcap
        if self.head.scale == 1 and cap is None:
            return logits
        if self.head.scale != 1:
            logits = logits * self.head.scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        # Rounding may have made ties.
        peak, best = logits.max(-1)
        self.peak[: len(wanted)], self.best[: len(wanted)] = peak, best
        return logits


class CachedProgram:
    """A step program over a KVCache: each row's text is one page, as long as the cache's room."""

    def __init__(self, step: StepProgram, cache: KVCache, batch: int, pads: Tensor) -> None:
        self._step = step
        self._cache = cache
        self._pads = pads.to(torch.int32)
        self._pages = torch.arange(batch, dtype=torch.int32)[:, None]
        self._bound: list[Any] = []

    @classmethod
    def of(
        cls, model: Any, cache: Any, mask: Tensor | None, batch: int, room: int
    ) -> CachedProgram | None:
        """For a cache of `batch` rows, padded where `mask` says so; None where there is none."""
        # A kind of its own (an encoder-decoder's) holds more than a step program knows of.
        stores: list[Any] = list(cache.stores) if type(cache) is KVCache else [None]
        if not all(type(store) is Growing for store in stores) or batch > decode.MOST_ROWS:
            return None
        # A view of a model (virtual tokens, invocations, a router) computes more than its modules.
        if "backbone" in vars(model):
            return None
        step = compile_step(model, decode.MOST_ROWS, room)
        if step is None:
            return None
        for store, (heads, size) in zip(stores, step.shapes):
            store.reserve(room)
            if store.buffers is None:
                nothing = torch.empty(batch, 0, heads, size, dtype=torch.bfloat16)
                store.update(nothing, nothing)
        pads = torch.zeros(batch) if mask is None else mask.long().argmax(1)
        return cls(step, cache, batch, pads)

    @property
    def rows(self) -> int:
        return self._step.rows

    def takes(self, ids: Tensor, last: int) -> bool:
        """Whether it should read `ids` [B, T]: few tokens, or weights that are slow to unpack."""
        batch, new = ids.shape
        keys = self._cache.stores[0].buffers[0]  # type: ignore[attr-defined]
        fits = len(keys) == batch == len(self._pads) and self._cache.length + new <= keys.shape[1]
        few = ids.numel() <= self.rows or (self._step.coded and last * batch <= self.rows)
        # An image's tokens share positions, of which the program knows nothing.
        return fits and few and self._cache.ahead is None

    def step(self, ids: Tensor, last: int) -> Tensor:
        """Logits [B, last, V] bf16 after the last of `ids` [B, T]."""
        batch, new = ids.shape
        stores: Any = self._cache.stores
        held = [store.buffers for store in stores]
        if not self._bound or held[0][0] is not self._bound[0][0]:
            self._step.bind([k for k, _ in held], [v for _, v in held])
            self._bound = held
        # Padding is not computed at all: its places stay empty and are never looked at.
        at = self._cache.length
        pads = self._pads.long()[:, None]
        positions = at - pads + torch.arange(new)
        real = (positions >= 0).flatten()
        wanted = torch.arange(batch * new, dtype=torch.int32).view(batch, new)[:, -last:]
        place = real.cumsum(0).sub(1).to(torch.int32)  # of each row among those that are real
        logits = self._step.run(
            ids.reshape(-1)[real],
            positions.flatten()[real],
            self._pages.repeat_interleave(new, 0)[real],
            self._pads.repeat_interleave(new, 0)[real],
            wanted=place[wanted.flatten().long()].clamp_min(0).contiguous(),
        )
        for store in stores:
            store.length += new
        return logits.view(batch, last, -1)

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The values [B] and ids [B] of the largest logits of a `step` with `last` 1."""
        count = len(self._pads)
        return self._step.peak[:count], self._step.best[:count].long()


def compile_step(
    model: Any, rows: int, length: int, adapters: Sequence[str] | None = None, **how: bool
) -> StepProgram | None:
    """The step of `model` for `rows` rows and texts of up to `length` tokens, or None.

    `adapters`: which adapters a row may name by their index; None: the active one acts on every
    row. `how`: portable and steady, see `Program`.
    """
    if rows > decode.MOST_ROWS or not decode.ready():
        return None
    try:
        return _Writer(model, rows, length, adapters, how).written()
    except UnknownError:
        return None


def _active(module: Any) -> Sequence[str]:
    """The adapter that acts in a module of its own accord, if any."""
    if not isinstance(module, AdaptedLayer):
        return ()
    _known(module.rows is None, module)
    names = [name for name in module.active if name in module.grafts]
    _known(len(names) <= 1 or module.disabled or bool(module.merged), names)
    return names[:1]


class _Writer:
    """Writes the program of one model."""

    def __init__(
        self, model: Any, rows: int, length: int, adapters: Sequence[str] | None,
        how: Mapping[str, Any],
    ) -> None:  # fmt: skip
        trunk, head = model.trunk, getattr(model, "lm_head", None)
        _known(type(trunk) is Decoder and head is not None, type(trunk))
        self.trunk: Decoder = trunk
        self.head: Any = head
        self.length = length
        self.adapters = adapters
        self.program = Program(rows, **how)
        self.tables: dict[RotarySpec, tuple[Tensor, Tensor]] = {}
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.coded = False
        _known(1 in (trunk.spec.input_scale, trunk.spec.embedding_scale), trunk.spec)
        self.x = self._shared("x", trunk.spec.hidden)

    def written(self) -> StepProgram:
        table: Any = self.trunk.embed_tokens
        spec = self.trunk.spec
        _known(type(table) in (nn.Embedding, ScaledEmbedding), table)
        _known(table.weight.dtype == torch.bfloat16, table.weight.dtype)
        scale = float(torch.tensor(getattr(table, "scale", 1.0), dtype=torch.bfloat16))
        self.program.embed(table.weight, self.x, scale * spec.input_scale)
        places, shapes = [], []
        block: Any
        for block in self.trunk.layers:
            _known(type(block) is Block, block)
            seen = self._normed(block, block.spec.norms.attention_in)
            places.append(self._attention(block, seen))
            mixer: Any = block.self_attn
            shapes.append((mixer.spec.kv_heads, mixer.spec.head_dim))
            if not block.spec.parallel:
                seen = self._normed(block, block.spec.norms.mlp_in)
            # What a parallel block has seen is still there, unless it is the stream itself.
            _known(not block.spec.parallel or seen is not self.x, block)
            self._mlp(block, seen)
        last = self._shared("last", spec.hidden)
        self.program.select(self.x, last, spec.hidden)
        self._norm(self.trunk.norm, last, last)
        logits = self._shared("logits", spec.vocab)
        self._linears(last, [(self.head, logits)])
        best, peak = torch.zeros(self.program.rows, dtype=torch.int32), torch.zeros(len(logits))
        self.program.best(logits, best, peak)
        return StepProgram(
            self.program, logits, best, peak, places, shapes, spec.head, self.coded
        )  # fmt: skip

    def _attention(self, block: Any, seen: Tensor) -> list[int]:
        layer: Any = block.self_attn
        spec, norm = layer.spec, layer.spec.qk_norm
        _known(
            type(layer) is Attention
            and not (spec.chunk or spec.clip or spec.temperature)
            and spec.heads // spec.kv_heads <= 16 and spec.head_dim % 32 == 0,
            spec,
        )  # fmt: skip
        heads, kv, size = spec.heads, spec.kv_heads, spec.head_dim
        q, out = self._shared("q", heads * size), self._shared("out", heads * size)
        k, v = self._shared("k", kv * size), self._shared("v", kv * size)
        if spec.fused:
            self._linears(seen, [(layer.qkv_proj, q), (layer.qkv_proj, k), (layer.qkv_proj, v)])
        else:
            self._linears(seen, [(layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v)])
        if norm is not None and not norm.after_rotary:
            self._qk_norm(layer, q, k)
        if spec.rotary is not None:
            cos, sin = self._table(spec.rotary)
            how = {"interleaved": spec.rotary.interleaved, "wide": spec.rotary.wide}
            self.program.rotary(q, heads, cos, sin, **how)
            self.program.rotary(k, kv, cos, sin, **how)
        if norm is not None and norm.after_rotary:
            self._qk_norm(layer, q, k)
        scale = size**-0.5 if spec.scale is None else spec.scale
        sinks = layer.sinks.detach() if spec.sinks else None
        _known(sinks is None or sinks.dtype == torch.bfloat16, sinks)
        places = [
            self.program.append(k, v, kv),
            self.program.attend(
                q, out, heads, kv, size, scale=scale, window=spec.window, softcap=spec.softcap,
                sinks=sinks,
            ),
        ]  # fmt: skip
        self._branch(block, out, getattr(layer, spec.out), block.spec.norms.attention_out)
        return places

    def _qk_norm(self, layer: Any, q: Tensor, k: Tensor) -> None:
        norm, size = layer.spec.qk_norm, layer.spec.head_dim
        for name, x in zip(norm.names, (q, k)):
            self._norm(getattr(layer, name), x, x, x.shape[1] if norm.over == "width" else size)

    def _mlp(self, block: Any, seen: Tensor) -> None:
        mlp: Any = getattr(block, block.spec.mlp_name)
        _known(type(mlp) in (Mlp, PlainMlp), mlp)
        names = [name for name in decode.ACTIVATIONS if ACTIVATIONS.get(name) is mlp.activation]
        _known(names, mlp.activation)
        if type(mlp) is PlainMlp:
            up, down = (getattr(mlp, name) for name in mlp.names)
            width = down.in_features
            wide, inner = self._shared("up", width), self._shared("inner", width)
            self._linears(seen, [(up, wide)])
            self.program.gate(wide, None, inner, names[0])
            self._branch(block, inner, down, block.spec.norms.mlp_out)
            return
        width = mlp.down_proj.in_features
        gate, up = self._shared("gate", width), self._shared("up", width)
        inner = self._shared("inner", width)
        pair = (mlp.gate_up_proj,) * 2 if mlp.fused else (mlp.gate_proj, mlp.up_proj)
        self._linears(seen, list(zip(pair, (gate, up))))
        self.program.gate(gate, up, inner, names[0])
        self._branch(block, inner, mlp.down_proj, block.spec.norms.mlp_out)

    def _normed(self, block: Any, name: str | None) -> Tensor:
        if name is None:
            return self.x
        to = self._shared("normed", self.trunk.spec.hidden)
        self._norm(getattr(block, name), self.x, to)
        return to

    def _branch(self, block: Any, inner: Tensor, linear: Any, name: str | None) -> None:
        """x += norm(linear(inner)), times the block's factor."""
        if name is None and block.spec.residual == 1:
            self._linears(inner, [(linear, self.x)], add=True)
            return
        branch = self._shared("branch", self.trunk.spec.hidden)
        self._linears(inner, [(linear, branch)])
        if name is not None:
            self._norm(getattr(block, name), branch, branch)
        self.program.add(self.x, branch, block.spec.residual)

    def _shared(self, name: str, width: int) -> Tensor:
        """One buffer for all layers that need it in this width."""
        if (name, width) not in self.buffers:
            self.buffers[name, width] = self.program.buffer(width)
        return self.buffers[name, width]

    def _table(self, spec: RotarySpec) -> tuple[Tensor, Tensor]:
        _known(spec.kind not in LENGTH_DEPENDENT, spec)
        if spec not in self.tables:
            cos, sin = spec.table(torch.arange(self.length)[None], torch.bfloat16)
            self.tables[spec] = cos[0].float().contiguous(), sin[0].float().contiguous()
        return self.tables[spec]

    def _norm(self, module: Any, x: Tensor, to: Tensor, width: int | None = None) -> None:
        kind = type(module)
        _known(kind in (*RMS_NORMS, *LAYER_NORMS, L2Norm), module)
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        for tensor in (weight, bias):
            _known(tensor is None or tensor.dtype == torch.bfloat16, module)
        offset, wide = getattr(module, "offset", False), getattr(module, "wide", False)
        self.program.norm(
            x, weight, to, module.eps, width=width, offset=float(offset), wide=wide, bias=bias,
            centred=kind in LAYER_NORMS,
        )  # fmt: skip

    def _linears(self, x: Tensor, parts: list[tuple[Any, Tensor]], add: bool = False) -> None:
        """Linears of `x` into their buffers, with the low-rank terms of the adapters.

        A linear that stands several times is split: its rows go to one buffer after the other.
        """
        weights: list[tuple[Weight, Tensor]] = []
        terms: list[tuple[list[Low | None], Tensor]] = []
        start, before = 0, None
        for module, to in parts:
            start = start if module is before else 0
            rows, before = slice(start, start + to.shape[1]), module
            start = rows.stop
            weights.append((self._weight(module, rows), to))
            names = _active(module) if self.adapters is None else self.adapters
            found = [self._term(module, name, rows) for name in names]
            if any(term is not None for term in found):
                terms.append((found, to))
        self.program.linears(x, weights, add)
        if terms:
            self.program.low_rank(x, [(to, found) for found, to in terms])

    def _weight(self, module: Any, rows: slice) -> Weight:
        base: Any = module.base_layer if isinstance(module, AdaptedLayer) else module
        tell = getattr(base, "native_weight", None)
        if tell is not None:
            whole: Weight | None = tell()
            self.coded = True
        else:
            hooked = base._forward_hooks or base._forward_pre_hooks
            _known(type(base) is nn.Linear and not hooked, base)
            outputs, inputs = base.weight.shape
            whole = Weight(base.weight, outputs, inputs, bias=base.bias)
        weight = None if whole is None else whole.part(rows)
        _known(weight is not None and weight.fits(), base)
        assert weight is not None
        return weight

    def _term(self, module: Any, name: str, rows: slice) -> Low | None:
        if not isinstance(module, AdaptedLayer) or module.disabled or module.merged:
            return None
        graft = module.grafts.get(name)
        if graft is None:
            return None
        term = graft.term() if self.adapters is None else graft.token_term()
        _known(term is not None, graft)
        assert term is not None
        a, b = (t.detach().to(torch.bfloat16).contiguous() for t in (term.a, term.b[rows]))
        return Low(a, b, float(term.scale))
