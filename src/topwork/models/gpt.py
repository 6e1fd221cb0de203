"""One skeleton for the GPT-shaped families: LayerNorms, plain MLPs, their own names on the Hub.

x = embed(ids)                                   (+ learned positions)
for each layer:   x = order(x, norm_1, attention, norm_2, mlp, drop)
logits = head(norm(x))

The spec says how a block is ordered, how positions enter (learned, rotary or ALiBi), how q, k and
v lie in their weights, and under which names all of it stands in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError, nearest
from topwork.models.base import CausalModel, Model
from topwork.models.config import Config
from topwork.models.heads import (
    BareModel,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from topwork.nn.alibi import AlibiSpec
from topwork.nn.cache import KVCache
from topwork.nn.conv1d import Conv1D
from topwork.nn.layers import ACTIVATIONS, linears
from topwork.nn.rotary import RotarySpec, rotary_table
from topwork.ops.recompute import recomputed
from topwork.weights import Rename, Table

Fn = Callable[[Tensor], Tensor]
Drop = tuple[Fn, Fn]  # the dropout of what attention adds, and of what the MLP adds


def pre_norm(x: Tensor, norm_1: Fn, attend: Fn, norm_2: Fn, mlp: Fn, drop: Drop) -> Tensor:
    x = x + drop[0](attend(norm_1(x)))
    return x + drop[1](mlp(norm_2(x)))


def post_norm(x: Tensor, norm_1: Fn, attend: Fn, norm_2: Fn, mlp: Fn, drop: Drop) -> Tensor:
    x = norm_1(x + drop[0](attend(x)))
    return norm_2(x + drop[1](mlp(x)))


def norm_in_stream(x: Tensor, norm_1: Fn, attend: Fn, norm_2: Fn, mlp: Fn, drop: Drop) -> Tensor:
    x = norm_1(x)
    x = norm_2(x + drop[0](attend(x)))
    return x + drop[1](mlp(x))


def parallel(x: Tensor, norm_1: Fn, attend: Fn, norm_2: Fn, mlp: Fn, drop: Drop) -> Tensor:
    return x + drop[0](attend(norm_1(x))) + drop[1](mlp(norm_2(x)))


def parallel_one_norm(x: Tensor, norm_1: Fn, attend: Fn, norm_2: Fn, mlp: Fn, drop: Drop) -> Tensor:
    seen = norm_1(x)
    return x + drop[0](attend(seen)) + drop[1](mlp(seen))


def parallel_sum(x: Tensor, norm_1: Fn, attend: Fn, norm_2: Fn, mlp: Fn, drop: Drop) -> Tensor:
    """`parallel` with one mask for both branches."""
    return x + drop[1](attend(norm_1(x)) + mlp(norm_2(x)))


def parallel_sum_one_norm(
    x: Tensor, norm_1: Fn, attend: Fn, norm_2: Fn, mlp: Fn, drop: Drop
) -> Tensor:
    """`parallel_one_norm` with one mask for both branches."""
    seen = norm_1(x)
    return x + drop[1](attend(seen) + mlp(seen))


ORDERS = {
    f.__name__: f
    for f in (
        pre_norm, post_norm, norm_in_stream, parallel, parallel_one_norm, parallel_sum,
        parallel_sum_one_norm,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Paths in the checkpoint: from the whole model, from its trunk, and from one layer.

    `qkv` is one path where they lie in one weight, else three.
    """

    trunk: str
    # from the trunk
    embed: str
    layers: str
    norm: str
    # from a layer
    norm_1: str
    qkv: tuple[str, ...]
    out: str
    norm_2: str
    up: str
    down: str
    # from the trunk, where the spec has them
    positions: str = "wpe"
    embed_norm: str = "word_embeddings_layernorm"
    project_in: str = "project_in"
    project_out: str = "project_out"


@dataclass(frozen=True)
class GptAttentionSpec:
    """Attention of one layer.

    Where q, k and v lie in one weight they are [q|k|v], or, if `grouped`, [q…, k, v] for each
    key/value head. `clip` bounds their values, `norm_qk` puts a LayerNorm over the whole width of
    and of k. `window` None sees all earlier tokens. `dropout` of the probabilities.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    grouped: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    window: int | None = None
    rotary: RotarySpec | None = None
    clip: float | None = None
    norm_qk: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads are no multiple of {self.kv_heads} kv heads")


@dataclass(frozen=True)
class GptMlpSpec:
    """down(act(up x))."""

    width: int
    activation: str
    bias: bool = True

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation {self.activation!r} is not known"
                f"{nearest(self.activation, ACTIVATIONS)}"
            )


@dataclass(frozen=True)
class GptLayerSpec:
    """What one block is made of; `order` is one of `ORDERS`, `dropout` the branches' rates."""

    attention: GptAttentionSpec
    mlp: GptMlpSpec
    order: str = "pre_norm"
    dropout: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class GptSpec:
    """A whole model.

    `hidden` is the width of the embedding and of what the head reads, `inner` that of the blocks.
    `learned`: rows in front of the first position of a table of positions, None for no table.
    `dropout` of what enters the blocks, `layer_drop`: how often a block is left out in training
    (arXiv:1909.11556). `renames`: names on disk that differ.
    """

    names: Names
    vocab: int
    hidden: int
    inner: int
    context: int
    norm_eps: float
    layers: tuple[GptLayerSpec, ...]
    tied: bool = True
    linear: type[nn.Linear] | type[Conv1D] = nn.Linear
    norm_affine: bool = True
    norm_bias: bool = True
    embed_norm: bool = False
    final_norm: bool = True
    learned: int | None = None
    alibi: AlibiSpec | None = None
    head_bias: bool = False
    logit_scale: float = 1.0
    dropout: float = 0.0
    layer_drop: float = 0.0
    renames: tuple[Rename, ...] = ()


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` below `root` under a dotted path."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, module)


def at(root: nn.Module, path: str) -> Any:
    """What stands there now: an adapter may have taken the module's place."""
    return reduce(getattr, path.split("."), root)


class GptBlock(nn.Module):
    """One layer."""

    def __init__(self, spec: GptSpec, index: int) -> None:
        super().__init__()
        layer, names = spec.layers[index], spec.names
        attention, mlp = layer.attention, layer.mlp
        self.spec, self.names, self.index = layer, names, index
        self.order = ORDERS[layer.order]
        self.rule = ops.Rule(attention.scale, window=attention.window)
        self.dropping = replace(self.rule, dropout=attention.dropout)  # in training
        self.activation = ACTIVATIONS[mlp.activation]

        def linear(path: str, size: int, width: int, bias: bool) -> None:
            # Conv1D names its sizes the other way round.
            sizes = (width, size) if spec.linear is Conv1D else (size, width)
            place(self, path, spec.linear(*sizes, bias=bias))

        wide, narrow = (n * attention.head_dim for n in (attention.heads, attention.kv_heads))
        widths = (wide, narrow, narrow) if len(names.qkv) == 3 else (wide + 2 * narrow,)
        for path, width in zip(names.qkv, widths):
            linear(path, spec.inner, width, attention.qkv_bias)
        linear(names.out, wide, spec.inner, attention.out_bias)
        linear(names.up, spec.inner, mlp.width, mlp.bias)
        linear(names.down, mlp.width, spec.inner, mlp.bias)
        for path in dict.fromkeys((names.norm_1, names.norm_2)):
            place(self, path, layer_norm(spec, spec.inner))
        if attention.norm_qk:
            home = names.out.rpartition(".")[0]
            place(self, f"{home}.q_ln", layer_norm(spec, wide))
            place(self, f"{home}.k_ln", layer_norm(spec, narrow))

    def forward(
        self,
        x: Tensor,
        tables: dict[RotarySpec, tuple[Tensor, Tensor]],
        terms: ops.ScoreTerms,
        layout: ops.Layout,
        cache: KVCache | None,
    ) -> Tensor:
        """x [B, T, C] → [B, T, C]."""

        def attend(seen: Tensor) -> Tensor:
            q, k, v = self._heads(seen, tables)
            held = layout
            if cache is not None:
                k, v = cache.update(self.index, k, v)
                held = layout.tail(q.shape[1], k.shape[1])
            rule = self.dropping if self.training else self.rule
            y = ops.attention(q, k, v, held, rule, terms)
            return linears(y.flatten(2), (at(self, names.out),))[0]

        names = self.names
        norm_1, norm_2 = at(self, names.norm_1), at(self, names.norm_2)
        return self.order(x, norm_1, attend, norm_2, self._mlp, (self._drop_1, self._drop_2))

    def _drop_1(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.spec.dropout[0]) if self.training and self.spec.dropout[0] else y

    def _drop_2(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.spec.dropout[1]) if self.training and self.spec.dropout[1] else y

    def _heads(self, x: Tensor, tables: dict[RotarySpec, tuple[Tensor, Tensor]]) -> list[Tensor]:
        """q [B, T, H, D], k and v [B, T, K, D], clipped, normed and turned as the spec says."""
        spec = self.spec.attention
        size = spec.head_dim
        parts = linears(x, [at(self, path) for path in self.names.qkv])
        if spec.clip is not None:
            parts = [y.clamp(-spec.clip, spec.clip) for y in parts]
        if spec.grouped:
            groups = parts[0].unflatten(-1, (spec.kv_heads, -1, size))
            q, k, v = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        else:
            if len(parts) == 1:
                narrow = spec.kv_heads * size
                parts = parts[0].split((spec.heads * size, narrow, narrow), -1)
            q, k, v = parts
            if spec.norm_qk:
                home = at(self, self.names.out.rpartition(".")[0])
                q, k = home.q_ln(q), home.k_ln(k)
            q, k, v = (y.unflatten(-1, (-1, size)) for y in (q, k, v))
        if spec.rotary is not None:
            cos, sin = tables[spec.rotary]
            q, k = (ops.rotary(y, cos, sin, spec.rotary.interleaved) for y in (q, k))
        return [q, k, v]

    def _mlp(self, x: Tensor) -> Tensor:
        up, down = at(self, self.names.up), at(self, self.names.down)
        return linears(self.activation(linears(x, (up,))[0]), (down,))[0]


def layer_norm(spec: GptSpec, size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, spec.norm_eps, spec.norm_affine, bias=spec.norm_bias)


class Gpt(nn.Module):
    """Embedding, blocks and the final norm: token ids to hidden states."""

    def __init__(self, spec: GptSpec) -> None:
        super().__init__()
        names = spec.names
        self.spec = spec
        self.checkpointing = False
        place(self, names.embed, nn.Embedding(spec.vocab, spec.hidden))
        if spec.inner != spec.hidden:
            place(self, names.project_in, nn.Linear(spec.hidden, spec.inner, bias=False))
            place(self, names.project_out, nn.Linear(spec.inner, spec.hidden, bias=False))
        if spec.learned is not None:
            place(self, names.positions, nn.Embedding(spec.context + spec.learned, spec.inner))
        if spec.embed_norm:
            place(self, names.embed_norm, layer_norm(spec, spec.inner))
        blocks = [GptBlock(spec, i) for i in range(len(spec.layers))]
        place(self, names.layers, nn.ModuleList(blocks))
        if spec.final_norm:
            place(self, names.norm, layer_norm(spec, spec.inner))

    @property
    def block_list(self) -> Any:
        return at(self, self.spec.names.layers)

    @property
    def layer_count(self) -> int:
        return len(self.spec.layers)

    @property
    def embedding(self) -> str:
        """The path of the token embedding."""
        return self.spec.names.embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor,
        layout: ops.Layout,
        cache: KVCache | None = None,
    ) -> Tensor:
        """ids [B, T] or embeddings [B, T, C], `positions` [B, T] → hidden [B, T, C]."""
        spec, names = self.spec, self.spec.names
        x = at(self, names.embed)(input_ids) if inputs_embeds is None else inputs_embeds
        longest = layout.longest if layout.lengths else layout.past + x.shape[1]
        if spec.inner != spec.hidden:
            x = at(self, names.project_in)(x)
        if spec.learned is not None:
            if longest > spec.context and int(positions.max()) >= spec.context:
                raise ConfigError(
                    f"{longest} tokens are more than the {spec.context} positions of this model"
                )
            x = x + at(self, names.positions)(positions + spec.learned)
        if spec.embed_norm:
            x = at(self, names.embed_norm)(x)
        kinds = {layer.attention.rotary for layer in spec.layers} - {None}
        tables = {kind: rotary_table(kind, positions, x.dtype) for kind in kinds if kind}
        terms = spec.alibi.terms(longest, x.device) if spec.alibi else ops.ScoreTerms()
        if self.training and spec.dropout:
            x = F.dropout(x, spec.dropout)
        skip = spec.layer_drop if self.training else 0.0
        for block in at(self, names.layers):
            if skip and float(torch.rand(())) < skip:
                continue
            if self.checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, tables, terms, layout, cache)
            else:
                x = block(x, tables, terms, layout, cache)
        if spec.final_norm:
            x = at(self, names.norm)(x)
        return at(self, names.project_out)(x) if spec.inner != spec.hidden else x


class CausalGpt(CausalModel):
    """A `Gpt` under its name on the Hub and its `lm_head`."""

    def __init__(self, config: Config, spec: GptSpec) -> None:
        super().__init__(config)
        self.home = spec.names.trunk
        self.add_module(self.home, Gpt(spec))
        self.lm_head = nn.Linear(spec.hidden, spec.vocab, bias=spec.head_bias)
        self.table = table_of(spec)
        embedding = f"{self.home}.{spec.names.embed}.weight"
        self.tied = {"lm_head.weight": embedding} if spec.tied else {}
        self.tie_weights()

    @property
    def trunk(self) -> Gpt:
        return getattr(self, self.home)

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    @property
    def windows(self) -> list[int | None]:
        return [layer.attention.window for layer in self.trunk.spec.layers]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C]."""
        scale = self.trunk.spec.logit_scale
        return super().head(hidden if scale == 1 else hidden * scale)

    def token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability [N] fp32 of `targets` [N] after `hidden` [N, C]; exact, in chunks."""
        if self.trunk.spec.logit_scale == 1:
            return super().token_logprobs(hidden, targets)
        return ops.token_logprobs_of(self.head, hidden, targets)


LM_HEAD, LABELS = r"^(lm_head|embed_out)\.", r"^(score|classifier)\."
ANSWERS = r"^qa_outputs\."
# Masks and angles that old files carry along.
BUFFERS = r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$"


def table_of(spec: GptSpec, drop: tuple[str, ...] = (), fresh: tuple[str, ...] = ()) -> Table:
    """Names on disk: the trunk's may be absent."""
    prefix = f"{spec.names.trunk}."
    return Table(spec.renames, drop=(BUFFERS, *drop), prefix=prefix, fresh=fresh)


def bare(config: Config, spec: GptSpec) -> BareModel:
    """The trunk without a head."""
    return BareModel(config, Gpt(spec), table=table_of(spec, drop=(LM_HEAD, LABELS, ANSWERS)))


def sequence_classifier(config: Config, spec: GptSpec) -> SequenceClassifier:
    """The trunk with `score` over each text's last token."""
    table = table_of(spec, drop=(LM_HEAD,), fresh=(LABELS,))
    return SequenceClassifier(config, Gpt(spec), table=table, home=spec.names.trunk)


def token_classifier(config: Config, spec: GptSpec) -> TokenClassifier:
    """The trunk with `classifier` over each token."""
    table = table_of(spec, drop=(LM_HEAD,), fresh=(LABELS,))
    return TokenClassifier(
        config, Gpt(spec), table=table, home=spec.names.trunk, head="classifier", bias=True
    )


def question_answerer(config: Config, spec: GptSpec) -> QuestionAnswerer:
    """The trunk with `qa_outputs` over each token."""
    table = table_of(spec, drop=(LM_HEAD, LABELS), fresh=(ANSWERS,))
    return QuestionAnswerer(config, Gpt(spec), table=table, home=spec.names.trunk)


# Task name → the model, made of its configuration and spec.
GPT_MODELS: dict[str, Callable[[Config, GptSpec], Model]] = {
    "base": bare,
    "causal-lm": CausalGpt,
    "sequence-classification": sequence_classifier,
    "token-classification": token_classifier,
    "question-answering": question_answerer,
}
