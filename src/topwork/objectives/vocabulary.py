"""Tokens that a run adds: room for them in the model, their rows trained beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topwork.errors import ConfigError
from topwork.peft import PeftConfig, PeftModel
from topwork.peft.targets import ends
from topwork.text import AutoTokenizer, Tokenizer


def tokens_of(args: Any) -> list[str]:
    """The tokens that `args` asks for. ConfigError for a text of nothing, or one named twice."""
    found = [*(getattr(args, "added_tokens", None) or ())]
    found += getattr(args, "added_special_tokens", None) or ()
    twice = sorted({t for t in found if found.count(t) > 1})
    if twice or not all(isinstance(t, str) and t for t in found):
        raise ConfigError(f"added tokens must be different texts, not {twice or found}")
    return found


def add_words(tokenizer: Tokenizer, args: Any) -> None:
    """Let the tokenizer know the tokens that `args` asks for."""
    if tokens_of(args):
        tokenizer.add_tokens(list(args.added_tokens or ()))
        tokenizer.add_tokens(list(args.added_special_tokens or ()), special=True)


def added_ids(tokenizer: Tokenizer, args: Any) -> list[int]:
    """The ids of the tokens that `args` asks for, once the tokenizer knows them."""
    words = tokenizer.get_vocab() if tokens_of(args) else {}
    return [words[token] for token in tokens_of(args)]


def extend(model: Any, tokenizer: Tokenizer, args: Any) -> None:
    """Add the tokens that `args` asks for to the tokenizer, and make room for them in `model`.

    Rows that were there without a token begin as the others' mean too.
    """
    if not tokens_of(args):
        return
    if isinstance(model, PeftModel):
        raise ConfigError(
            "added_tokens: the model has an adapter already, whose embedding cannot grow; pass the "
            "base and peft_config"
        )
    known = len(tokenizer)
    add_words(tokenizer, args)
    words = model.get_input_embeddings()
    rows = words.weight.shape[0]
    if known < rows:
        _begin_anew(model, known, min(len(tokenizer), rows))
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=args.resize_to_multiple_of)


@torch.no_grad()
def _begin_anew(model: Any, first: int, stop: int) -> None:
    """Rows [first, stop) of the embedding and the head become the mean of those before them."""
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(getattr(end, "weight", None), nn.Parameter) and first:
            end.weight[first:stop] = end.weight[:first].float().mean(0).to(end.weight.dtype)


def as_large(other: Any, model: Any) -> Any:
    """`other`, a model beside the run's, with as many tokens at least."""
    rows = [m.get_input_embeddings().weight.shape[0] for m in (other, model)]
    if rows[0] < rows[1]:
        other.resize_token_embeddings(rows[1])
    return other


def with_tokens(config: PeftConfig, model: Any, ids: Sequence[int]) -> PeftConfig:
    """`config` so that the rows of `ids` are trained and saved with the adapter: those of the
    embedding, and those of a head that is not tied to it.

    ConfigError for a method that trains no rows.
    """
    if not ids:
        return config
    if "trainable_token_indices" not in {f.name for f in fields(config)}:
        raise ConfigError(
            f"added_tokens: {config.peft_type} trains no rows of the embedding; use LoraConfig, or "
            "train the model whole (without peft_config)"
        )
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is words.weight
    paths = {id(module): path for path, module in model.named_modules()}
    given: Any = config.trainable_token_indices  # type: ignore[attr-defined]
    whole = config.modules_to_save or []  # type: ignore[attr-defined]
    found = given if isinstance(given, Mapping) else {_short(paths[id(words)]): given or []}
    found = {name: list(indices) for name, indices in found.items()}
    for end in (words,) if tied else (words, head):
        path = paths[id(end)]
        if any(ends(path, entry) for entry in whole):
            continue  # trained whole
        name = next((n for n in found if ends(path, n)), _short(path))
        found[name] = list(dict.fromkeys([*found.get(name, []), *ids]))
    rows: Any = {name: indices for name, indices in found.items() if indices} or None
    if tied and rows is not None and len(rows) == 1 and not isinstance(given, Mapping):
        (rows,) = rows.values()
    changes: dict[str, Any] = {"trainable_token_indices": rows}
    return replace(config, **changes)


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def clone_chat_template(
    model: Any,
    tokenizer: Tokenizer,
    source_tokenizer_path: str | Path,
    resize_to_multiple_of: int | None = 64,
) -> tuple[Any, Tokenizer, list[int]]:
    """Give `tokenizer` the chat template, the added tokens and the end token of another one, and
    `model` room for them. Returns both, and the new tokens' ids.

    With `resize_to_multiple_of` tokens "<extra_id_0>" … fill up the vocabulary to the embedding.
    """
    source = AutoTokenizer.from_pretrained(source_tokenizer_path)
    if source.chat_template is None:
        raise ConfigError(f"{source_tokenizer_path}: this tokenizer has no chat template")
    tokenizer.chat_template = source.chat_template
    before = tokenizer.get_vocab()
    decoder = source.core.get_added_tokens_decoder()
    fresh = [token for _, token in sorted(decoder.items()) if token.content not in before]
    for token in fresh:
        tokenizer.add_tokens([token.content], special=token.special)
    tokenizer.eos_token = source.eos_token
    for settings in (model.config.__dict__, model.generation_config):
        settings["eos_token_id"] = tokenizer.eos_token_id
    words = model.resize_token_embeddings(len(tokenizer), resize_to_multiple_of)
    added = [token.content for token in fresh]
    number = 0
    while len(tokenizer) < words.num_embeddings:
        name = f"<extra_id_{number}>"
        added += [name] * tokenizer.add_tokens([name])
        number += 1
    vocabulary = tokenizer.get_vocab()
    return model, tokenizer, [vocabulary[token] for token in added]
