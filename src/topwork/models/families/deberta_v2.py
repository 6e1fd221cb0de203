"""DeBERTa v2 and v3: BERT whose scores know content and distance apart (arXiv:2006.03654)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.encoder import (
    POSITIONS,
    BlockNames,
    EmbeddingSpec,
    EncoderSpec,
    PostNormBlock,
    PostNormSpec,
)
from topwork.models.encoder_heads import FamilySpec, HeadSpec, encoder_models
from topwork.models.families._encoders import head_size
from topwork.nn.layers import ACTIVATIONS, activation
from topwork.nn.paths import part, place
from topwork.ops.disentangled import disentangled_attention

V3 = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 6,
      "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
      "type_vocab_size": 0, "max_relative_positions": -1}  # fmt: skip
CASES = [
    V3,
    {**V3, "share_att_key": False, "pos_att_type": "c2p|p2c", "position_buckets": 4,
     "type_vocab_size": 2, "position_biased_input": True, "pooler_hidden_act": "tanh",
     "max_relative_positions": 15},
    {**V3, "position_buckets": -1, "norm_rel_ebd": "none", "pos_att_type": ["c2p"],
     "share_att_key": False, "max_relative_positions": 9, "layer_norm_eps": 0.1},
    {**V3, "pos_att_type": ["p2c"], "conv_kernel_size": 3, "conv_act": "gelu", "hidden_act": "relu",
     "conv_groups": 2, "embedding_size": 16},
    {**V3, "relative_attention": False, "position_biased_input": True, "legacy": False,
     "norm_rel_ebd": "none", "attention_head_size": 12, "conv_kernel_size": 5},
    {"relative_attention": False, "pos_att_type": None, "tie_word_embeddings": False},
]  # fmt: skip
NAMES = BlockNames(
    "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"
)  # fmt: skip
POSITION_KEY, POSITION_QUERY = "attention.self.pos_key_proj", "attention.self.pos_query_proj"


@dataclass(frozen=True)
class Distances:
    """The embeddings of distances, and the convolution beside the first block.

    `span`: how many distances there are to each side; `buckets` of them, where positive, hold
    ever longer ranges up to `longest`.
    """

    hidden: int
    eps: float
    span: int
    buckets: int
    longest: int
    normed: bool
    kernel: int
    groups: int

    def place(self, encoder: nn.Module) -> None:
        if self.span:
            place(encoder, "encoder.rel_embeddings", nn.Embedding(2 * self.span, self.hidden))
        if self.normed:
            place(encoder, "encoder.LayerNorm", nn.LayerNorm(self.hidden, self.eps))
        if self.kernel:
            conv = nn.Conv1d(
                self.hidden, self.hidden, self.kernel, padding=(self.kernel - 1) // 2,
                groups=self.groups,
            )  # fmt: skip
            place(encoder, "encoder.conv.conv", conv)
            place(encoder, "encoder.conv.LayerNorm", nn.LayerNorm(self.hidden, self.eps))

    def shared(
        self, encoder: nn.Module, positions: Tensor, longest: int, like: Tensor
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"conv": getattr(encoder.encoder, "conv", None)}
        if self.span:
            table = part(encoder, "encoder.rel_embeddings").weight
            found["table"] = part(encoder, "encoder.LayerNorm")(table) if self.normed else table
            found["index"] = self.index(longest, like.device)
        return found

    def index(self, size: int, device: torch.device) -> Tensor:
        """The row of the embeddings for query (first) and key (second) [size, size]."""
        at = torch.arange(size, device=device)
        distance = at[:, None] - at[None, :]
        if self.buckets > 0:
            middle = self.buckets // 2
            far = distance.abs().clamp(min=middle).float()
            growth = torch.log(far / middle) / math.log((self.longest - 1) / middle)
            bucket = torch.ceil(growth * (middle - 1)) + middle
            near = distance.abs() <= middle
            distance = torch.where(near, distance, (bucket * distance.sign()).long())
        return (distance + self.span).clamp(0, 2 * self.span - 1)


@dataclass(frozen=True)
class Disentangled:
    """Which scores a block adds to content by content; `shared_keys`: with the content's maps."""

    content_to_position: bool
    position_to_content: bool
    relative: bool
    shared_keys: bool
    convolution: str = "tanh"

    @property
    def scores(self) -> int:
        return 1 + self.content_to_position + self.position_to_content


class DebertaBlock(PostNormBlock):
    """A post-norm block with disentangled attention; the first may have a convolution beside it."""

    def __init__(self, spec: PostNormSpec, kind: Disentangled, index: int) -> None:
        super().__init__(spec)
        self.kind = kind
        self.index = index
        wide = spec.heads * spec.head_dim
        if kind.relative and not kind.shared_keys:
            if kind.content_to_position:
                place(self, POSITION_KEY, nn.Linear(spec.hidden, wide))
            if kind.position_to_content:
                place(self, POSITION_QUERY, nn.Linear(spec.hidden, wide))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared: Any, layout: ops.Layout) -> Tensor:
        kind, spec = self.kind, self.spec
        scale = (spec.head_dim * kind.scores) ** -0.5
        if not kind.relative:
            return ops.attention(q, k, v, layout, self.rule(scale))
        table = F.dropout(shared["table"], spec.dropouts[1], self.training)
        maps = (NAMES.key, NAMES.query) if kind.shared_keys else (POSITION_KEY, POSITION_QUERY)
        keys, queries = (
            part(self, path)(table).unflatten(-1, (spec.heads, -1)) if used else None
            for path, used in zip(maps, (kind.content_to_position, kind.position_to_content))
        )
        return disentangled_attention(
            q, k, v, keys, queries, shared["index"], layout, scale, self.rule(scale).dropout
        )

    def forward(self, x: Tensor, shared: Any, layout: ops.Layout) -> Tensor:  # type: ignore[override]
        y = super().forward(x, shared, layout)
        conv = shared["conv"]
        if self.index or conv is None:
            return y
        texts = [x] if layout.lengths is None else x.split(layout.lengths, 1)
        beside = torch.cat([conv.conv(t.transpose(1, 2)).transpose(1, 2) for t in texts], 1)
        beside = F.dropout(beside, self.spec.dropouts[1], self.training)
        return conv.LayerNorm(y + ACTIVATIONS[self.kind.convolution](beside))


def distances(read: ConfigReader, hidden: int, eps: float) -> Distances:
    longest, buckets = read("max_relative_positions", -1), read("position_buckets", -1)
    context = read("max_position_embeddings", 512)
    longest = longest if longest > 0 else context
    relative = read("relative_attention", False)
    span = (buckets if buckets > 0 else longest) if relative else 0
    normed = "layer_norm" in [x.strip() for x in read("norm_rel_ebd", "none").lower().split("|")]
    kernel, groups = read("conv_kernel_size", 0), read("conv_groups", 1)
    return Distances(hidden, eps, span, buckets, longest, normed, kernel, groups)


def disentangled(read: ConfigReader) -> Disentangled:
    kinds = read("pos_att_type", [])
    kinds = [x.strip() for x in kinds.lower().split("|")] if isinstance(kinds, str) else kinds
    if set(kinds) - {"c2p", "p2c"}:
        raise ConfigError(f"pos_att_type={kinds!r}: only 'c2p' and 'p2c' are known")
    return Disentangled(
        "c2p" in kinds,
        "p2c" in kinds,
        bool(read("relative_attention", False)) and bool(kinds),
        bool(read("share_att_key", False)),
        activation(read("conv_act", "tanh")),
    )


def masked_head(read: ConfigReader, act: str) -> HeadSpec:
    """The head of the v2 files, or with `legacy` false that of the original code."""
    if read("legacy", True):
        at = "cls.predictions"
        return HeadSpec(
            f"{at}.decoder", f"{at}.transform.dense", act, f"{at}.transform.LayerNorm",
            bias=f"{at}.bias", width=read("embedding_size", read.need("hidden_size")),
        )  # fmt: skip
    at = "lm_predictions.lm_head"
    return HeadSpec(f"{at}.decoder", f"{at}.dense", act, f"{at}.LayerNorm", bias=f"{at}.bias")


def family(read: ConfigReader) -> FamilySpec:
    read.ignore("padding_idx", "pooler_size")
    hidden, count = read.need("hidden_size"), read.need("num_attention_heads")
    eps, dropout = read("layer_norm_eps", 1e-7), read.rate("hidden_dropout_prob", 0.1)
    act, size = activation(read("hidden_act", "gelu")), read("embedding_size", hidden)
    if read("pooler_hidden_size", hidden) != hidden:
        raise ConfigError(f"pooler_hidden_size={read('pooler_hidden_size')} is not hidden_size")
    block = PostNormSpec(
        hidden, count, read("attention_head_size", head_size(hidden, count)),
        read.need("intermediate_size"), act, eps,
        (read.rate("attention_probs_dropout_prob", 0.1), dropout, dropout), NAMES,
    )  # fmt: skip
    kind = disentangled(read)
    embedding = EmbeddingSpec(
        read.need("vocab_size"),
        size,
        read("max_position_embeddings", 512) if read("position_biased_input", True) else 0,
        read("type_vocab_size", 0),
        norm_size=hidden,
        inner="embeddings.embed_proj" if size != hidden else None,
    )
    spec = EncoderSpec(
        hidden,
        eps,
        dropout,
        embedding,
        tuple(f"encoder.layer.{i}" for i in range(read.need("num_hidden_layers"))),
        lambda i: DebertaBlock(block, kind, i),
        relation=distances(read, hidden, eps),
    )
    sentence = HeadSpec(
        "classifier", "pooler.dense", activation(read("pooler_hidden_act", "gelu")), pool="first",
        dropout=read.rate("cls_dropout", dropout), drop_first=read.rate("pooler_dropout"),
    )  # fmt: skip
    heads = {
        "masked-lm": masked_head(read, act),
        "sequence-classification": sentence,
        "token-classification": HeadSpec("classifier", dropout=dropout),
        "question-answering": HeadSpec("qa_outputs"),
        "multiple-choice": replace(sentence),
    }
    tied, others = bool(read("tie_word_embeddings", True)), ("mask_predictions", "lm_predictions")
    return FamilySpec("deberta", spec, heads, tied, ("cls", *others, POSITIONS))


MODELS = encoder_models(family)
