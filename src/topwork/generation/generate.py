"""The decoding loop: one pass over the prompt, then one token at a time with the cache."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from topwork.errors import ConfigError, TopworkError
from topwork.generation.config import GenerationConfig
from topwork.generation.sampling import choose, shape


class Streamer(Protocol):
    """Receives the prompt, then each step's ids [B], then `end`."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


@torch.inference_mode()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    **options: Any,
) -> Tensor:
    """Continue `input_ids` [B, T] (left-padded where `attention_mask` is 0); returns [B, T + new].

    Options come from the call, then `generation_config`, or else the model's own file. Rows that
    have ended are filled with the padding id. Raises ConfigError for a prompt that is empty,
    right-padded or too long, and TopworkError when the logits are not numbers.
    """
    config = _config(model, generation_config, options)
    new = _budget(model, input_ids, attention_mask, config)
    if config.num_return_sequences > 1:
        input_ids = input_ids.repeat_interleave(config.num_return_sequences, 0)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(config.num_return_sequences, 0)
    was_training = model.training
    model.eval()
    try:
        return _loop(model, input_ids, attention_mask, config, new, streamer)
    finally:
        model.train(was_training)


def _config(
    model: Any, given: GenerationConfig | None, options: dict[str, Any]
) -> GenerationConfig:
    if given is not None:
        return GenerationConfig.of(dict(vars(given)), options)
    file = dict(model.generation_config)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        file.setdefault(name, model.config.get(name))
    return GenerationConfig.of(file, options)


def _budget(model: Any, input_ids: Tensor, mask: Tensor | None, config: GenerationConfig) -> int:
    """How many tokens may be made, after looking whether the prompt can be used at all."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ConfigError(f"the prompt is empty or not [B, T]: shape {list(input_ids.shape)}")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ConfigError(
            f"ids {low} … {high} lie outside the vocabulary of {model.config.vocab_size}"
        )
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ConfigError(f"attention_mask {list(mask.shape)} is not {list(input_ids.shape)}")
        if not bool(mask[:, -1].all()):
            raise ConfigError("a row is padded on the right, or empty; pad prompts on the left")
    length = input_ids.shape[1]
    context = model.config.get("max_position_embeddings")
    if context is not None and length > context:
        raise ConfigError(f"the prompt has {length} tokens, the model's context is {context}")
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return 20
    if config.max_length <= length:
        raise ConfigError(f"max_length={config.max_length} leaves no room after {length} tokens")
    return config.max_length - length


def _loop(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    config: GenerationConfig,
    new: int,
    streamer: Streamer | None,
) -> Tensor:
    batch, length = ids.shape
    stops = torch.tensor(config.stops, device=ids.device)
    filler = config.pad_token_id if config.pad_token_id is not None else (config.stops or [0])[0]
    generator = None
    if config.seed is not None:
        generator = torch.Generator(device=ids.device).manual_seed(config.seed)
    out = ids.new_full((batch, length + new), filler)
    out[:, :length] = ids
    # What counts as said: padding does not, so it is a repeat of the row's last id here.
    said = out if mask is None else out.clone()
    if mask is not None:
        said[:, :length] = torch.where(mask.bool(), ids, ids[:, -1:])
    done = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is not None:
        mask = torch.cat((mask, mask.new_ones(batch, new)), 1)
    cache, step, at = model.new_cache(), ids, length
    if streamer is not None:
        streamer.put(ids)
    while at < length + new:
        seen = None if mask is None else mask[:, :at]
        hidden = model.backbone(step, attention_mask=seen, cache=cache)
        logits = model.head(hidden[:, -1]).float()
        if bool(logits.isnan().any()):
            raise TopworkError(f"the logits are not numbers at token {at}: the weights are damaged")
        logits = shape(logits, said[:, :at], at - length, config)
        chosen = choose(logits, config, generator).masked_fill(done, filler)
        out[:, at] = said[:, at] = chosen
        at += 1
        if streamer is not None:
            streamer.put(chosen)
        if len(stops):
            done |= torch.isin(chosen, stops)
            if bool(done.all()):
                break
        step = chosen[:, None]
    if streamer is not None:
        streamer.end()
    return out[:, :at].clone()
