"""`generate`: check a prompt and its options, then decode in the way that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation import beams, contrastive, draw, speculative
from topwork.generation.config import GenerationConfig
from topwork.generation.guidance import guided, only_allowed
from topwork.generation.loop import Criterion, GenerateOutput, Stepper, Streamer, Task, decode
from topwork.generation.processors import Processor, cuts, processors
from topwork.generation.stopping import StopStrings
from topwork.nn.cache import KVCache


@torch.inference_mode()
def generate(
    model: Any,
    input_ids: Tensor | Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    *,
    inputs: Tensor | Mapping[str, Any] | None = None,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Criterion] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    assistant_model: Any = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
    """Continue `input_ids` [B, T] (left-padded where `attention_mask` is 0); returns [B, T + new].

    They may be called `inputs`, be what a tokenizer returns, or be left out to begin with a bos.
    Options come from the call, then `generation_config`, or else the model's own files:
    generation_config.json before config.json. Rows that have ended are filled with the padding id.
    `stop_strings` needs the `tokenizer`. `past_key_values`, from an earlier call, holds their
    beginning. With `return_dict_in_generate` a GenerateOutput comes back. Raises ConfigError for a
    prompt that is empty, right-padded or too long, or an option that cannot be meant, and
    TopworkError when the logits are not numbers.
    """
    config = resolve_config(model, generation_config, options)
    ids, mask = _prompt(model, input_ids if inputs is None else inputs, attention_mask, config)
    task = _task(model, ids, mask, config, past_key_values)
    task.streamer, task.criteria = streamer, list(stopping_criteria or ())
    if config.stop_strings:
        task.criteria.append(StopStrings(tokenizer, config.stop_strings))
    extra = [_with_padding(run, task.vocab, config.filler) for run in logits_processor or ()]
    first = []
    if config.guidance_scale not in (None, 1):
        if config.num_beams > 1 or assistant_model or config.prompt_lookup_num_tokens:
            raise ConfigError("guidance_scale goes with neither beams nor guessing ahead")
        first.append(
            guided(model, config.guidance_scale or 1.0, negative_prompt_ids,
                   negative_prompt_attention_mask, task.new)
        )  # fmt: skip
    if prefix_allowed_tokens_fn is not None:
        extra.append(only_allowed(prefix_allowed_tokens_fn, config.num_beams))
    length = task.ids.shape[1]
    shaping = config if config.num_beams > 1 else draw.uncut(config)
    task.processors = processors(
        shaping, task.vocab, length, length + task.new, first=first, extra=extra
    )
    if shaping is not config:
        task.cuts = cuts(config)
    was_training = model.training
    model.eval()
    try:
        output = _decode(task, assistant_model)
    finally:
        model.train(was_training)
    return output if config.return_dict_in_generate else output.sequences


def _prompt(
    model: Any, given: Any, mask: Tensor | None, config: GenerationConfig
) -> tuple[Tensor, Tensor | None]:
    """The ids and their mask; ConfigError where there are none to begin with."""
    if isinstance(given, Mapping):
        return given["input_ids"], given.get("attention_mask") if mask is None else mask
    if given is not None:
        return given, mask
    if config.bos_token_id is None:
        raise ConfigError("generate needs input_ids, or a bos_token_id to begin with")
    return torch.tensor([[config.bos_token_id]], device=model.device), None


def _task(
    model: Any, ids: Tensor, mask: Tensor | None, config: GenerationConfig, cache: Any
) -> Task:
    """The rows to run, with their masks over all the tokens there will be, and a cache."""
    new = budget(model, ids, mask, config)
    if mask is not None and bool(mask.all()):
        mask = None
    if config.num_beams == 1 and config.num_return_sequences > 1:
        copies = config.num_return_sequences
        ids = ids.repeat_interleave(copies, 0)
        mask = None if mask is None else mask.repeat_interleave(copies, 0)
    length = ids.shape[1]
    if mask is not None:
        mask = torch.cat((mask, mask.new_ones(len(ids), new)), 1)
    row_mask = None if mask is None else mask.repeat_interleave(config.num_beams, 0)
    cache = cache or _cache(model, config, length + new)
    if cache.length >= length:
        cache.crop(length - 1)
    step = Stepper(model, cache, row_mask, config.prefill_chunk_size, length + new)
    return Task(config, step, ids, mask, new, model.config.vocab_size)


def _decode(task: Task, assistant_model: Any) -> GenerateOutput:
    """Choose the loop."""
    config = task.config
    guess: speculative.Guess | None = None
    count = config.num_assistant_tokens
    if config.prompt_lookup_num_tokens:
        count = config.prompt_lookup_num_tokens
        guess = speculative.lookup(config.max_matching_ngram_size, task.stops)
    elif assistant_model is not None:
        guess = speculative.assistant(assistant_model, task.step.model)
    if guess is not None and (config.num_beams > 1 or config.contrastive):
        raise ConfigError("guessing ahead goes with neither beams nor contrastive search")
    if guess is not None:
        return speculative.decode(task, guess, count)
    if config.num_beams > 1:
        return beams.search(task)
    return contrastive.search(task) if config.contrastive else decode(task)


def _with_padding(run: Processor, vocab: int, filler: int) -> Processor:
    """A caller's processor sees padding as the padding id."""
    return lambda seen, scores: run(seen.masked_fill(seen == vocab, filler), scores)


def _cache(model: Any, config: GenerationConfig, length: int) -> Any:
    kind = config.cache_implementation
    if kind == "static":
        return KVCache.static(model.layer_count, length)
    if kind == "quantized":
        return KVCache.quantised(model.layer_count)
    return KVCache.sliding(model.windows) if kind == "sliding_window" else model.new_cache()


def resolve_config(
    model: Any, given: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """The call's options, then `given`, or else the model's files."""
    if given is not None:
        return GenerationConfig.of(dict(vars(given)), options)
    file = dict(model.generation_config)
    # Before generation_config.json there was config.json, where 20 is merely a default.
    old = [f.name for f in fields(GenerationConfig)] if not file else []
    for name in {*old, "eos_token_id", "pad_token_id", "bos_token_id"}:
        value = model.config.get(name)
        if value is not None and (name, value) != ("max_length", 20):
            file.setdefault(name, value)
    return GenerationConfig.of(file, options)


def budget(model: Any, input_ids: Tensor, mask: Tensor | None, config: GenerationConfig) -> int:
    """How many tokens may be made, after looking whether the prompt can be used at all."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ConfigError(f"the prompt is empty or not [B, T]: shape {list(input_ids.shape)}")
    image = getattr(getattr(model, "spec", None), "image_token", None)
    if image is not None and bool((input_ids == image).any()):
        raise ConfigError(
            f"the prompt has image tokens (id {image}), which are read by model.generate(…, "
            "pixel_values=…) alone"
        )
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


def transition_scores(
    sequences: Tensor, scores: Sequence[Tensor], beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:  # fmt: skip
    """The score [B, new] with which each new token of `sequences` [B, T + new] was chosen.

    `scores`, `beam_indices`: of the same GenerateOutput. With `normalize_logits` the scores are
    log-probabilities; with beams they are anyway.
    """
    table = torch.stack(tuple(scores), 1)  # [rows, new, V]
    table = table.log_softmax(-1) if normalize_logits else table
    if beam_indices is None:
        beam_indices = torch.arange(len(sequences), device=table.device)[:, None]
        beam_indices = beam_indices.expand(-1, len(scores))
    new = int((beam_indices >= 0).sum(-1).max())
    rows = beam_indices[:, :new]
    tokens = sequences[:, sequences.shape[1] - new :]
    found = table[rows.clamp(min=0), torch.arange(new, device=table.device), tokens]
    return found.masked_fill(rows < 0, 0.0)
