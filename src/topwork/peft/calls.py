"""Virtual tokens in the calls of models that have no `backbone`: encoders and encoder-decoders,
and all models of transformers. Outputs are those of the given tokens, except that a text's one
vector is read where the model reads it: at the first token, which is a virtual one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.prompts import Lengths, Prompt, keys_values, sizes_of

TOKENWISE = ("logits", "last_hidden_state", "start_logits", "end_logits")


def forward(model: Any, prompt: Prompt, call: dict[str, Any]) -> Any:
    """The model's call with the virtual tokens."""
    if _has_two_halves(model):
        return _answer(model, prompt, "forward", call)
    virtual = prompt.config.num_virtual_tokens
    task_ids, lengths = call.pop("task_ids", None), call.get("lengths")
    ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
    given = ids if embeds is None else embeds
    batch, tokens = given.shape[:2]
    texts = batch if lengths is None else len(lengths)
    call.pop("position_ids", None)
    kinds, labels = call.pop("input_type_mask", None), None
    if prompt.weighs:
        labels = call.pop("labels", None)
    call = {k: v for k, v in call.items() if v is not None}
    if "attention_mask" in call and not (prompt.is_prefix and _is_ours(model)):
        ones = call["attention_mask"].new_ones(texts, virtual)
        call["attention_mask"] = behind(ones, call["attention_mask"], lengths)
    if prompt.is_prefix:
        named = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        if _is_ours(model):
            if not hasattr(model.trunk, "behind"):
                raise ConfigError(f"a prefix does not go to {type(model).__name__}")
            with model.trunk.behind(keys_values(prompt, texts)):
                return model(**named, **call)
        call.pop("token_type_ids", None)
        return model(**named, **call, past_key_values=peer_cache(model, prompt, batch))
    embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
    call["inputs_embeds"] = behind(prompt(texts, task_ids).to(embeds.dtype), embeds, lengths)
    for name, filler in (("labels", -100), ("token_type_ids", 0)):
        tensor = call.get(name)
        if tensor is not None and tensor.shape == (batch, tokens):
            call[name] = behind(tensor.new_full((texts, virtual), filler), tensor, lengths)
    for name in ("start_positions", "end_positions"):
        if name in call:  # what lies outside of the text stays outside
            call[name] = torch.where(call[name] < 0, call[name], call[name] + virtual)
    if lengths is not None:
        call["lengths"] = tuple(n + virtual for n in lengths)
    output = model(**call)
    if labels is not None:
        context, logits = output.logits[:, :virtual], output.logits[:, virtual:]
        output.loss = prompt.loss(context, logits, labels, kinds, None)
    whole = (batch, tokens + virtual * texts // batch)
    for name in TOKENWISE:
        tensor = getattr(output, name, None)
        if tensor is not None and tensor.shape[:2] == whole and name in _own(output):
            setattr(output, name, without(tensor, virtual, call.get("lengths")))
    return output


def generate(model: Any, prompt: Prompt, call: dict[str, Any]) -> Any:
    """`generate` after the virtual tokens: [B, T + new], of an encoder-decoder the answers."""
    if _has_two_halves(model):
        return _answer(model, prompt, "generate", call)
    ids, virtual = call.pop("input_ids"), prompt.config.num_virtual_tokens
    batch = ids.shape[0]
    mask = call.pop("attention_mask", None)
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask.new_ones(batch, virtual), mask], 1)
    if "max_length" in call:
        call["max_new_tokens"] = call.pop("max_length") - ids.shape[1]
    if prompt.is_prefix:
        # The cache holds the first tokens; which ids stand for them has no effect.
        padded = torch.cat([ids.new_zeros(batch, virtual), ids], 1)
        cache = peer_cache(model, prompt, batch)
        out = model.generate(padded, attention_mask=mask, past_key_values=cache, **call)
        return _changed(out, lambda made: made[:, virtual:])
    embeds = model.get_input_embeddings()(ids)
    made = prompt(batch, call.pop("task_ids", None)).to(embeds.dtype)
    out = model.generate(inputs_embeds=torch.cat([made, embeds], 1), attention_mask=mask, **call)
    return _changed(out, lambda new: torch.cat([ids, new], 1))


def _changed(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What `generate` gave, with its tokens changed: they are in a field where scores are asked
    for."""
    if isinstance(out, Tensor):
        return change(out)
    out.sequences = change(out.sequences)
    return out


def _answer(model: Any, prompt: Prompt, name: str, call: dict[str, Any]) -> Any:
    """A call of an encoder-decoder. A prefix stands before the decoder's tokens; embeddings stand
    before the encoder's, and those of a multitask prompt before the decoder's, too."""
    config, task_ids = prompt.config, call.pop("task_ids", None)
    virtual = config.num_virtual_tokens
    given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if given is None:
        raise ConfigError("virtual tokens need input_ids or inputs_embeds")
    batch = given.shape[0]
    if prompt.is_prefix and _is_ours(model):
        view = copy.copy(model)
        pairs = [(k.to(model.dtype), v.to(model.dtype)) for k, v in keys_values(prompt, batch)]
        view.cache_of = lambda memory: model.cache_of(memory).begin(pairs)
        return getattr(view, name)(**call, **({"use_cache": True} if name == "forward" else {}))
    if prompt.is_prefix:
        cache = peer_cache(model, prompt, batch)
        return getattr(model, name)(**call, past_key_values=cache)
    ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
    words = getattr(model, "embed_words", None) or model.get_input_embeddings()
    embeds = words(ids) if embeds is None else embeds
    made = prompt(batch, task_ids).to(embeds.dtype)
    call["inputs_embeds"] = torch.cat([made[:, :virtual], embeds], 1)
    if call.get("attention_mask") is not None:
        mask = call["attention_mask"]
        call["attention_mask"] = torch.cat([mask.new_ones(batch, virtual), mask], 1)
    both = config.peft_type == "MULTITASK_PROMPT_TUNING" and made.shape[1] == 2 * virtual
    if name != "forward" or not both:
        return getattr(model, name)(**call)
    return _with_begun_answer(model, words, made[:, virtual:], call)


def _with_begun_answer(model: Any, words: Any, made: Tensor, call: dict[str, Any]) -> Any:
    """The call with embeddings `made` [B, n, C] before the answer's, and its outputs without."""
    batch, virtual = made.shape[:2]
    labels, ids = call.get("labels"), call.pop("decoder_input_ids", None)
    if ids is None and call.get("decoder_inputs_embeds") is None:
        sizes = sizes_of(model)
        if labels is None:
            raise ConfigError("the decoder needs decoder_input_ids or labels")
        start = labels.new_full((batch, 1), sizes["decoder_start_token_id"])
        ids = torch.cat([start, labels[:, :-1]], 1)
        ids = ids.masked_fill(ids == -100, sizes.get("pad_token_id") or 0)
    embeds = call.get("decoder_inputs_embeds")
    embeds = words(ids) if embeds is None else embeds
    call["decoder_inputs_embeds"] = torch.cat([made, embeds], 1)
    if labels is not None:
        call["labels"] = torch.cat([labels.new_full((batch, virtual), -100), labels], 1)
    if call.get("decoder_attention_mask") is not None:
        mask = call["decoder_attention_mask"]
        call["decoder_attention_mask"] = torch.cat([mask.new_ones(batch, virtual), mask], 1)
    output = model(**call)
    output.logits = output.logits[:, virtual:]
    return output


def behind(made: Tensor, values: Tensor, lengths: Lengths) -> Tensor:
    """`values` [B, T, ...] after `made` [B, n, ...]; of packed texts [1, N, ...] each after its
    own."""
    if lengths is None:
        return torch.cat([made, values], 1)
    parts = [part for pair in zip(made, values[0].split(list(lengths))) for part in pair]
    return torch.cat(parts)[None]


def without(values: Tensor, virtual: int, lengths: Lengths) -> Tensor:
    """`values` without the first `virtual` tokens of each text."""
    if lengths is None:
        return values[:, virtual:]
    return torch.cat([part[virtual:] for part in values[0].split(list(lengths))])[None]


def peer_cache(model: Any, prompt: Prompt, batch: int) -> Any:
    """A cache of the library that `model` is of, with the prefix in it."""
    library = sys.modules[type(model).__module__.partition(".")[0]]
    make = getattr(library, "DynamicCache", None)
    if make is None:
        raise ConfigError(f"a prefix does not go to {type(model).__name__}: it has no known cache")
    cache = make()
    dtype = next(model.parameters()).dtype
    for layer, (k, v) in enumerate(keys_values(prompt, batch)):
        cache.update(k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype), layer)
    return library.EncoderDecoderCache(cache, make()) if _has_two_halves(model) else cache


def _has_two_halves(model: nn.Module) -> bool:
    return bool(sizes_of(model).get("is_encoder_decoder")) or hasattr(model, "cache_of")


def _is_ours(model: nn.Module) -> bool:
    return type(model).__module__.startswith("topwork.")


def _own(output: Any) -> Any:
    """The names that an output stores (others are made from those)."""
    return output if isinstance(output, dict) else vars(output)
