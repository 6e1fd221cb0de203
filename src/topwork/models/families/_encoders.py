"""What the families of BERT read alike."""

from __future__ import annotations

from dataclasses import replace

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.encoder import (
    BlockNames,
    EmbeddingSpec,
    EncoderSpec,
    PostNormBlock,
    PostNormSpec,
)
from topwork.models.encoder_heads import FamilySpec, HeadSpec
from topwork.nn.layers import activation


def refuse_unusual(read: ConfigReader) -> None:
    """Options of old files that only one value is known for."""
    if read("position_embedding_type", "absolute") != "absolute":
        raise ConfigError(
            f"position_embedding_type={read('position_embedding_type')!r}: only 'absolute' "
            "positions are supported"
        )
    if read("is_decoder", False) or read("add_cross_attention", False):
        raise ConfigError("is_decoder=true: an encoder does not work as a decoder here")
    read.ignore("gradient_checkpointing", "output_past")


def bert_like(
    read: ConfigReader,
    prefix: str,
    heads: dict[str, HeadSpec],
    *,
    names: BlockNames = BlockNames(),  # noqa: B008 (frozen)
    first: int = 0,
    types: int | None = None,
    outer: str | None = None,
    pooler: str | None = "pooler.dense",
    dropouts: tuple[float, float, float] | None = None,
) -> FamilySpec:
    """An encoder in BERT's shape from the keys that they share; the differences are arguments."""
    refuse_unusual(read)
    hidden, count = read.need("hidden_size"), read.need("num_attention_heads")
    embedded = read("embedding_size", hidden) if outer else hidden
    eps = read("layer_norm_eps", 1e-12)
    if dropouts is None:
        dropout = read.rate("hidden_dropout_prob", 0.1)
        dropouts = read.rate("attention_probs_dropout_prob", 0.1), dropout, dropout
    block = PostNormSpec(
        hidden,
        count,
        head_size(hidden, count),
        read.need("intermediate_size"),
        activation(read("hidden_act", "gelu")),
        eps,
        dropouts,
        names,
    )
    embedding = EmbeddingSpec(
        read.need("vocab_size"),
        embedded,
        read("max_position_embeddings", 512),
        read("type_vocab_size", 2) if types is None else types,
        first,
        outer=outer if embedded != hidden else None,
    )
    spec = EncoderSpec(
        hidden,
        eps,
        dropouts[1],
        embedding,
        tuple(f"encoder.layer.{i}" for i in range(read.need("num_hidden_layers"))),
        lambda _: PostNormBlock(block),
        pooler=pooler,
    )
    return FamilySpec(prefix, spec, heads, bool(read("tie_word_embeddings", True)))


def head_size(hidden: int, heads: int) -> int:
    """ConfigError when the heads do not share the hidden size evenly."""
    if hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}")
    return hidden // heads


def classifier_dropout(read: ConfigReader) -> float:
    """`classifier_dropout`, else the dropout of the hidden states."""
    return read.rate("classifier_dropout", read.rate("hidden_dropout_prob", 0.1))


def plain_heads(read: ConfigReader) -> dict[str, HeadSpec]:
    """Heads of tokens that are named alike in most families."""
    return {
        "token-classification": HeadSpec("classifier", dropout=classifier_dropout(read)),
        "question-answering": HeadSpec("qa_outputs"),
    }


def pooled_head(read: ConfigReader, pooler: str) -> HeadSpec:
    """A classifier on the first token's tanh(dense(x))."""
    return HeadSpec("classifier", pooler, "tanh", pool="first", dropout=classifier_dropout(read))


def roberta_like(
    read: ConfigReader,
    prefix: str = "roberta",
    names: BlockNames = BlockNames(),  # noqa: B008 (frozen)
    first: int | None = None,
    types: int | None = None,
) -> FamilySpec:
    """BERT whose positions begin after the padding id (or at `first`), with heads of its own."""
    dropout = read.rate("hidden_dropout_prob", 0.1)
    heads = {
        **plain_heads(read),
        "masked-lm": HeadSpec(
            "lm_head.decoder", "lm_head.dense", norm="lm_head.layer_norm", bias="lm_head.bias"
        ),
        "sequence-classification": HeadSpec(
            "classifier.out_proj", "classifier.dense", "tanh", pool="first",
            dropout=classifier_dropout(read), drop_first=classifier_dropout(read),
        ),
        "multiple-choice": replace(pooled_head(read, f"{prefix}.pooler.dense"), dropout=dropout),
    }  # fmt: skip
    start = read("pad_token_id", 1) + 1 if first is None else first
    return bert_like(read, prefix, heads, names=names, first=start, types=types)


ROBERTA_CASES = [
    {},
    {"pad_token_id": 4, "type_vocab_size": 1, "hidden_act": "gelu_new", "layer_norm_eps": 0.1},
    {"pad_token_id": 0, "num_attention_heads": 2, "tie_word_embeddings": False},
]
