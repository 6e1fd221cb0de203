"""Another number of tokens: the embedding, the head over the vocabulary, and what names their size.

New rows are the mean of the old ones, so that a new token begins as likely as a token on average
(Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError


def resize(
    model: Any, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean: bool
) -> nn.Embedding:
    """Bring `model` to so many tokens, in place; see `Model.resize_token_embeddings`."""
    words, head = _ends(model)
    old = words.num_embeddings
    size = old if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    if size < 1:
        raise ConfigError(f"new_num_tokens={new_num_tokens}: a vocabulary has at least one token")
    if size == old:
        return words
    _refuse_others(model, words, head, old)
    spread = None if mean else float(model.config.get("initializer_range") or 0.02)
    grown = {id(p): _resized(p, size, spread) for p in _parameters(words, head)}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in grown:
                module._parameters[name] = grown[id(parameter)]
        _tell(module, old, size)
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None:
        kept = min(old, size)
        model.final_logits_bias = torch.cat((bias[:, :kept], bias.new_zeros(1, size - kept)), 1)
    _note(model, size)
    return words


def _ends(model: Any) -> tuple[nn.Embedding, nn.Linear | None]:
    """The plain embedding and head. ConfigError where something stands around or in them."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    for one, kind in ((words, nn.Embedding), (head, nn.Linear)):
        if one is not None and not (isinstance(one, kind) and isinstance(one.weight, nn.Parameter)):
            raise ConfigError(
                f"{type(one).__name__} cannot be resized: do it before an adapter is added, and on "
                "a head that is not quantised"
            )
    return words, head


def _refuse_others(model: Any, words: nn.Embedding, head: Any, old: int) -> None:
    """ConfigError for a further vocabulary, which would stay as it is."""
    known = {id(p) for p in _parameters(words, head)}
    others = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module.num_embeddings == old
        and id(module.weight) not in known
    ]
    if others:
        raise ConfigError(f"{others} has a vocabulary of its own: this model cannot be resized")


def _parameters(words: nn.Embedding, head: nn.Linear | None) -> list[nn.Parameter]:
    found: list[Any] = [words.weight]
    if head is not None:
        found += [p for p in (head.weight, head.bias) if p is not None]
    return found


def _resized(parameter: nn.Parameter, size: int, spread: float | None) -> nn.Parameter:
    """Its first rows, and rows of their mean (`spread`: of the normal distribution, so wide)."""
    values = parameter.detach()
    more = size - len(values)
    if more > 0:
        rows = values.float().mean(0, keepdim=True).expand(more, *values.shape[1:])
        if spread is not None:
            rows = torch.zeros_like(rows) if values.dim() == 1 else torch.randn_like(rows) * spread
        values = torch.cat((values, rows.to(values.dtype)))
    return nn.Parameter(values[:size].clone(), requires_grad=parameter.requires_grad)


def _tell(module: Any, old: int, size: int) -> None:
    """Let the module know its size where it states it."""
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(module.weight)
        if module.padding_idx is not None and module.padding_idx >= module.num_embeddings:
            module.padding_idx = None
    elif isinstance(module, nn.Linear) and isinstance(module.weight, Tensor):
        module.out_features = len(module.weight)
    if is_dataclass(getattr(module, "spec", None)):
        module.spec = _with_vocab(module.spec, old, size)


def _with_vocab(spec: Any, old: int, size: int) -> Any:
    """`spec` with the new size in its field `vocab`, and in those of the specs within it."""
    changed: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name == "vocab" and value == old:
            changed[field.name] = size
        elif is_dataclass(value) and not isinstance(value, type):
            made = _with_vocab(value, old, size)
            if made is not value:
                changed[field.name] = made
    return replace(spec, **changed) if changed else spec


def _note(model: Any, size: int) -> None:
    """The new size in the configuration, be it nested or not."""
    values = model.config.__dict__
    text = values.get("text_config")
    if isinstance(text, Mapping):
        values["text_config"] = {**text, "vocab_size": size}
    if not isinstance(text, Mapping):
        values["vocab_size"] = size
    for name in ("vocab_size", "decoder_vocab_size"):
        if values.get(name) is not None:
            values[name] = size
