"""Encoder-decoders: one text in, another out."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.base import Model
from topwork.models.config import Config
from topwork.models.output import Output
from topwork.models.packing import Padding, packed_positions
from topwork.models.stack import DecoderCache, Memory, Stack, StackSpec
from topwork.models.step import StackStep
from topwork.nn.layers import linears
from topwork.nn.paths import part, place
from topwork.weights import PLAIN, Table


@dataclass(frozen=True)
class Seq2SeqSpec:
    """Both stacks, and what stands around them.

    `home`: the path of the stacks ("model" or ""). `shared`: both embed with the same table.
    `output_scale` multiplies the decoder's states before the head; `bias`: the head has a
    `final_logits_bias`. `wraps`: the decoder begins with the last token of the answer (a language
    code), not with `decoder_start_token_id`. `head_name`: where the output's linear stands.
    """

    home: str
    encoder: StackSpec
    decoder: StackSpec
    shared: bool = True
    tied: bool = True
    output_scale: float = 1.0
    bias: bool = True
    wraps: bool = False
    table: Table = PLAIN
    head_name: str = "lm_head"

    def path(self, name: str) -> str:
        return f"{self.home}.{name}" if self.home else name


@dataclass
class Seq2SeqOutput(Output):
    """`logits` [B, T, V]; `loss`, the mean over the labelled tokens, when labels were given."""

    loss: Tensor | None
    logits: Tensor
    encoder_last_hidden_state: Tensor | None = None
    past_key_values: DecoderCache | None = None


def shifted(labels: Tensor, pad: int | None, start: int | None, wraps: bool) -> Tensor:
    """The decoder's input for `labels` [B, T]: they begin one later, after `start`.

    With `wraps` a row begins with its own last token instead.
    """
    if pad is None:
        raise ConfigError("labels need pad_token_id in the configuration to begin the decoder")
    ids = labels.masked_fill(labels == -100, pad)
    if wraps:
        last = (ids != pad).sum(1, keepdim=True) - 1
        first = ids.gather(1, last.clamp(min=0))
    elif start is None:
        raise ConfigError("labels need decoder_start_token_id in the configuration")
    else:
        first = torch.full_like(ids[:, :1], start)
    return torch.cat((first, ids[:, :-1]), 1)


class Seq2SeqModel(Model):
    """Reads a text with its encoder and writes another with its decoder."""

    final_logits_bias: Tensor

    def __init__(self, config: Config, spec: Seq2SeqSpec, encoder: Stack | None = None) -> None:
        super().__init__(config)
        self.spec, self.table = spec, spec.table
        self.tied = {}
        words = f"{spec.path('decoder.embed_tokens')}.weight"
        if spec.shared:
            place(self, spec.path("shared"), nn.Embedding(spec.encoder.vocab, spec.encoder.hidden))
            words = f"{spec.path('shared')}.weight"
            self.tied = {
                f"{spec.path(side)}.embed_tokens.weight": words for side in ("encoder", "decoder")
            }
        place(self, spec.path("encoder"), encoder or Stack(spec.encoder))
        place(self, spec.path("decoder"), Stack(spec.decoder))
        self._add_head()
        if spec.tied and hasattr(self, spec.head_name):
            self.tied[f"{spec.head_name}.weight"] = words
        self.tie_weights()

    def _add_head(self) -> None:
        spec = self.spec
        linear = nn.Linear(spec.decoder.hidden, spec.decoder.vocab, bias=False)
        self.add_module(spec.head_name, linear)
        if spec.bias:
            self.register_buffer("final_logits_bias", torch.zeros(1, spec.decoder.vocab))

    @property
    def encoder_stack(self) -> Stack:
        return part(self, self.spec.path("encoder"))

    @property
    def decoder_stack(self) -> Stack:
        return part(self, self.spec.path("decoder"))

    @property
    def trunk(self) -> Stack:
        """The decoder, which is what stands below the head."""
        return self.decoder_stack

    @property
    def layer_count(self) -> int:
        return self.spec.decoder.count

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self.encoder_stack.checkpointing = self.decoder_stack.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.encoder_stack.checkpointing = self.decoder_stack.checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        name = "shared" if self.spec.shared else "encoder.embed_tokens"
        return part(self, self.spec.path(name))

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self, self.spec.head_name)

    def embed_words(self, ids: Tensor) -> Tensor:
        """Embeddings [B, T, C] as `inputs_embeds` are given."""
        return self.get_input_embeddings()(ids) * self.spec.encoder.embedding_scale

    # -- the two halves --------------------------------------------------------------------------

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Memory:
        """The memory of padded rows [B, S] (computed packed), or of texts packed in one row."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ConfigError("an encoder-decoder needs input_ids or inputs_embeds")
        if lengths is None and attention_mask is not None and not bool(attention_mask.all()):
            rows = Padding.of(attention_mask)
            _no_empty_rows(rows)
            input_ids, inputs_embeds = (
                None if t is None else rows.pack(t) for t in (input_ids, inputs_embeds)
            )
            given, lengths = rows.pack(given), rows.lengths
        longest = max(lengths) if lengths else given.shape[1]
        _fits(longest, self.spec.encoder, self.config.model_type)
        hidden = self.encoder_stack(
            input_ids,
            inputs_embeds=inputs_embeds,
            positions=_places(given, lengths, 0),
            longest=longest,
            layout=ops.Layout(lengths),
        )
        return Memory(hidden, lengths)

    def decode(
        self,
        memory: Memory | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: DecoderCache | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Hidden states [B, T, C] of the answer's rows; padding comes back as zeros.

        `memory` None: the cache holds it. `lengths`: the answers are packed in one row, as the
        memory is.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ConfigError(
                "the decoder needs decoder_input_ids, decoder_inputs_embeds or labels"
            )
        batch, tokens = given.shape[:2]
        past = cache.length + cache.virtual if cache is not None else 0
        longest = max(lengths) if lengths else past + tokens
        _fits(longest, self.spec.decoder, self.config.model_type)
        rows = None
        if lengths is not None:
            layout = ops.Layout(lengths)
        elif cache is not None:
            cache.spread(batch)
            layout = ops.Layout(None, past)
        elif memory is not None and (memory.lengths is not None or attention_mask is not None):
            mask = given.new_ones(batch, tokens) if attention_mask is None else attention_mask
            rows = Padding.of(mask[..., 0] if mask.dim() == 3 else mask)
            _no_empty_rows(rows)
            memory = _packed(memory, len(rows.lengths))
            input_ids, inputs_embeds = (
                None if t is None else rows.pack(t) for t in (input_ids, inputs_embeds)
            )
            given, layout = rows.pack(given), ops.Layout(rows.lengths)
        else:
            layout = ops.Layout()
        hidden = self.decoder_stack(
            input_ids,
            inputs_embeds=inputs_embeds,
            positions=_places(given, layout.documents if layout.lengths else None, past),
            longest=longest,
            layout=layout,
            memory=memory,
            cache=cache,
        )
        return hidden if rows is None else rows.unpack(hidden)

    def cache_of(self, memory: Memory) -> DecoderCache:
        """An empty cache for answers to `memory`, with its keys and values."""
        pairs, keep = self.decoder_stack.remember(memory.hidden), None
        if memory.lengths is None:
            return DecoderCache([(k, v) for k, v in pairs], None)
        sizes = torch.tensor(memory.lengths, device=memory.hidden.device)
        keep = torch.arange(max(memory.lengths), device=sizes.device) < sizes[:, None]
        rows = Padding(keep, memory.lengths)
        padded = [
            tuple(rows.unpack(t.flatten(2)).unflatten(-1, t.shape[2:]) for t in pair)
            for pair in pairs
        ]
        return DecoderCache([(k, v) for k, v in padded], None if bool(keep.all()) else keep)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the decoder's states [..., C]."""
        if self.spec.output_scale != 1:
            hidden = hidden * self.spec.output_scale
        (logits,) = linears(hidden, (getattr(self, self.spec.head_name),))
        return logits + self.final_logits_bias[0] if self.spec.bias else logits

    def token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability [N] fp32 of `targets` [N] after `hidden` [N, C]; exact, in chunks."""
        return ops.token_logprobs_of(self.head, hidden, targets)

    # -- the familiar calls ----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        use_cache: bool = False,
    ) -> Seq2SeqOutput:
        """`labels` [B, T] (-100: none) also give the decoder's input, when that is not given."""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            get = self.config.get
            decoder_input_ids = shifted(
                labels, get("pad_token_id"), get("decoder_start_token_id"), self.spec.wraps
            )
            if decoder_attention_mask is None:
                decoder_attention_mask = _until_last(labels)
        cache, memory = past_key_values, None
        if cache is None:
            memory = as_memory(encoder_outputs, attention_mask)
            if memory is None:
                memory = self.encode(input_ids, attention_mask, inputs_embeds)
            cache = self.cache_of(memory) if use_cache else None
        hidden = self.decode(
            memory, decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, cache
        )
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        seen = None
        if memory is not None and memory.lengths is None:
            seen = memory.hidden
        elif memory is not None and attention_mask is not None:
            seen = Padding.of(attention_mask).unpack(memory.hidden)
        return Seq2SeqOutput(loss, logits, seen, cache)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Answers [B, T] to the texts [B, S] (padded on either side); see `generation.generate`.

        They begin with `decoder_start_token_id` (or `decoder_input_ids`), which `max_length`
        counts.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                memory = as_memory(encoder_outputs, attention_mask)
                if memory is None:
                    memory = self.encode(input_ids, attention_mask, inputs_embeds)
                view = DecoderView(self, memory)
                if decoder_input_ids is None:
                    count = len(memory.lengths) if memory.lengths else len(memory.hidden)
                    start = self._start(options)
                    decoder_input_ids = torch.full((count, 1), start, device=self.device)
            generation = importlib.import_module("topwork.generation")
            return generation.generate(view, decoder_input_ids, **options)
        finally:
            self.train(was_training)

    def _start(self, options: dict[str, Any]) -> int:
        sources = (options, self.generation_config, self.config.to_dict())
        given = options.get("generation_config")
        if given is not None:
            sources = (options, vars(given), *sources[1:])
        for name in ("decoder_start_token_id", "bos_token_id"):
            for source in sources:
                if source.get(name) is not None:
                    return int(source[name])
        raise ConfigError(
            "no decoder_start_token_id: neither the call nor the model's files name it"
        )


class DecoderView:
    """The decoder over one memory, as the decoding loops see a causal model."""

    def __init__(self, model: Seq2SeqModel, memory: Memory) -> None:
        self.model, self.memory = model, memory
        vocab = model.spec.decoder.vocab
        self.config = Config(**{**model.config.to_dict(), "vocab_size": vocab})
        self.generation_config = model.generation_config
        self.layer_count = model.layer_count
        self.windows = [None] * model.layer_count
        self.head = model.head
        self.training = False
        self._step: StackStep | None = None
        if type(model).decode is Seq2SeqModel.decode and not model.training:
            self._step = StackStep.of(model.decoder_stack)

    def new_cache(self, batch_size: int | None = None) -> DecoderCache:
        return self.model.cache_of(self.memory)

    def backbone(
        self, ids: Tensor, *, attention_mask: Tensor | None = None, cache: DecoderCache
    ) -> Tensor:
        past = cache.length + cache.virtual
        if self._step is None or ids.shape[1] != 1 or not past:
            return self.model.decode(None, ids, cache=cache)
        _fits(past + 1, self.model.spec.decoder, self.model.config.model_type)
        cache.spread(len(ids))
        return self._step(ids, past, cache)

    def eval(self) -> DecoderView:
        return self

    def train(self, mode: bool = True) -> DecoderView:
        return self


def as_memory(encoder_outputs: Any, attention_mask: Tensor | None) -> Memory | None:
    """The memory of an encoder's output: a Memory, a tensor [B, S, C], or what holds one."""
    if encoder_outputs is None or isinstance(encoder_outputs, Memory):
        return encoder_outputs
    hidden = getattr(encoder_outputs, "last_hidden_state", encoder_outputs)
    hidden = hidden[0] if isinstance(hidden, (tuple, list)) else hidden
    if attention_mask is None or bool(attention_mask.all()):
        return Memory(hidden)
    rows = Padding.of(attention_mask)
    return Memory(rows.pack(hidden), rows.lengths)


def _packed(memory: Memory, count: int) -> Memory:
    if memory.lengths is not None:
        if len(memory.lengths) != count:
            raise ConfigError(f"{count} answers, but {len(memory.lengths)} texts")
        return memory
    batch, tokens = memory.hidden.shape[:2]
    return Memory(memory.hidden.flatten(0, 1)[None], (tokens,) * batch)


def _places(given: Tensor, lengths: tuple[int, ...] | None, past: int) -> Tensor:
    if lengths is not None:
        return packed_positions(lengths, given.device)
    return torch.arange(past, past + given.shape[1], device=given.device)[None]


def _fits(longest: int, spec: StackSpec, model_type: str) -> None:
    if spec.context and longest > spec.context:
        raise ConfigError(
            f"a text of {longest} tokens is longer than the {spec.context} positions of this "
            f"{model_type}; cut it with truncation=True, max_length={spec.context}"
        )


def _no_empty_rows(rows: Padding) -> None:
    if len(rows.lengths) != len(rows.keep):
        empty = (~rows.keep.any(1)).nonzero().flatten().tolist()
        raise ConfigError(f"every token of row {empty[0]} is padding")


def _until_last(labels: Tensor) -> Tensor:
    """1 up to the last labelled token of each row (at least one token)."""
    known = labels != -100
    known[:, 0] = True
    return known.flip(1).cumsum(1).flip(1) > 0
