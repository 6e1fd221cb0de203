"""Models that look at an image and write a text: its caption, or the answer to a question (BLIP).

memory = tower(image);   for an answer: memory = encoder(question, memory)
logits = head(decoder(text, memory))
"""

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
from topwork.models.seq2seq import DecoderView, Seq2SeqModel, Seq2SeqSpec
from topwork.models.stack import Memory, Stack, StackSpec
from topwork.models.vision import VisionSpec, VisionTower
from topwork.nn.layers import ACTIVATIONS, linears
from topwork.nn.paths import part, place, place_parameter
from topwork.weights import Table


@dataclass(frozen=True)
class ReaderSpec:
    """Where the parts stand. `encoder`: the stack that reads questions, None for captions."""

    tower: VisionSpec
    decoder: StackSpec
    encoder: StackSpec | None
    table: Table
    smoothing: float = 0.0
    tied: bool = True
    tower_path: str = "vision_model"
    encoder_path: str = "text_encoder"
    decoder_path: str = "text_decoder.bert"
    head_path: str = "text_decoder.cls.predictions"


@dataclass
class ReaderOutput(Output):
    """`logits` [B, T, V]; `loss`, the mean over the labelled tokens; the tower's states."""

    loss: Tensor | None
    logits: Tensor
    image_embeds: Tensor | None = None


class ImageReader(Seq2SeqModel):
    """What a model of captions and one of answers share."""

    def __init__(self, config: Config, spec: ReaderSpec, vision: Config) -> None:
        Model.__init__(self, config)
        asked = spec.encoder or spec.decoder
        self.spec = Seq2SeqSpec("", asked, spec.decoder, shared=False, tied=False, bias=False)
        self.reader, self.table = spec, spec.table
        place(self, spec.tower_path, VisionTower(vision, spec.tower))
        if spec.encoder is not None:
            place(self, spec.encoder_path, Stack(spec.encoder))
        place(self, spec.decoder_path, Stack(spec.decoder))
        size, head = spec.decoder.hidden, spec.head_path
        place(self, f"{head}.transform.dense", nn.Linear(size, size))
        place(self, f"{head}.transform.LayerNorm", spec.decoder.norm.build(size))
        place(self, f"{head}.decoder", nn.Linear(size, spec.decoder.vocab))
        place_parameter(self, f"{head}.bias", torch.zeros(spec.decoder.vocab))
        words = f"{spec.decoder_path}.{spec.decoder.names.words}.weight"
        self.tied = {f"{head}.decoder.bias": f"{head}.bias"}
        if spec.tied:
            self.tied[f"{head}.decoder.weight"] = words
        self.tie_weights()

    @property
    def encoder_stack(self) -> Stack:
        return part(self, self.reader.encoder_path)

    @property
    def decoder_stack(self) -> Stack:
        return part(self, self.reader.decoder_path)

    @property
    def tower(self) -> VisionTower:
        return part(self, self.reader.tower_path)

    def _checkpointing(self, on: bool) -> None:
        self.tower.checkpointing = self.decoder_stack.checkpointing = on
        if self.reader.encoder is not None:
            self.encoder_stack.checkpointing = on

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self._checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._checkpointing(False)

    def get_input_embeddings(self) -> nn.Module:
        return part(self.decoder_stack, self.reader.decoder.names.words)

    def get_output_embeddings(self) -> nn.Module:
        return part(self, f"{self.reader.head_path}.decoder")

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the decoder's states [..., C]."""
        home = part(self, self.reader.head_path)
        x = linears(hidden, (home.transform.dense,))[0]
        x = home.transform.LayerNorm(ACTIVATIONS[self.reader.decoder.activation](x))
        return self.get_output_embeddings()(x)

    def look(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """The tower's states [B, S, C] of images [B, channels, height, width]."""
        tower = self.tower
        return tower.normed(tower.features(pixel_values, -1, interpolate=interpolate))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        following = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(
            logits.flatten(0, 1).float(), following.flatten(),
            label_smoothing=self.reader.smoothing,
        )  # fmt: skip

    def _text(self, name: str) -> int | None:
        return (self.config.get("text_config") or {}).get(name)

    def _written(self, labels: Tensor) -> Tensor:
        pad = self._text("pad_token_id")
        return labels.masked_fill(labels == -100, 0 if pad is None else pad)

    def _generated(
        self, memory: Memory, ids: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Any:
        options = dict(options)
        if "generation_config" not in options:
            options.setdefault("eos_token_id", self._text("sep_token_id"))
            options.setdefault("pad_token_id", self._text("pad_token_id"))
        if mask is not None and not bool(mask.all()):
            raise ConfigError("prompts of captions cannot be padded: give those of one length")
        view = DecoderView(self, memory)
        return importlib.import_module("topwork.generation").generate(view, ids, **options)

    @property
    def start(self) -> int:
        """The token that a text begins with."""
        found = self._text("bos_token_id")
        if found is None:
            raise ConfigError("text_config has no bos_token_id, which texts begin with")
        return int(found)


def _pixels(pixel_values: Tensor | None) -> Tensor:
    if pixel_values is None:
        raise ConfigError("there is no image: pixel_values were not given")
    return pixel_values


class Captioner(ImageReader):
    """Writes what an image shows."""

    task = "image-text-to-text"

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ReaderOutput:
        """`labels` [B, T] are not shifted (-100: none); without `input_ids` they are read too."""
        if input_ids is None and labels is None:
            raise ConfigError("captions need input_ids or labels; to write them call generate")
        ids = self._written(labels) if input_ids is None and labels is not None else input_ids
        seen = self.look(_pixels(pixel_values), interpolate_pos_encoding)
        logits = self.head(self.decode(Memory(seen), ids, attention_mask))
        return ReaderOutput(None if labels is None else self._loss(logits, labels), logits, seen)

    def generate(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> Any:
        """Captions [B, T], which begin as `input_ids` do, less their last token (the end).

        Options are those of `topwork.generation.generate`.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                seen = self.look(_pixels(pixel_values), interpolate_pos_encoding)
                if input_ids is None:
                    ids = torch.full((len(seen), 1), self.start, device=seen.device)
                else:
                    ids = input_ids[:, :-1].clone()
                    ids[:, 0] = self.start
                mask = None if attention_mask is None else attention_mask[:, :-1]
                return self._generated(Memory(seen), ids, mask, options)
        finally:
            self.train(was_training)


class ImageAnswerer(ImageReader):
    """Answers questions about an image."""

    task = "visual-question-answering"

    def ask(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Memory:
        """What the decoder looks at: questions [B, T], read in sight of the images [B, S, C]."""
        spec = self.spec.encoder
        longest = input_ids.shape[1]
        if spec.context and longest > spec.context:
            raise ConfigError(f"a question of {longest} tokens: at most {spec.context} are read")
        row = torch.arange(longest, device=input_ids.device)[None]
        if attention_mask is None or bool(attention_mask.all()):
            hidden = self.encoder_stack(
                input_ids, positions=row, longest=longest, layout=ops.Layout(), memory=Memory(seen)
            )
            return Memory(hidden)
        rows = Padding.of(attention_mask)
        if len(rows.lengths) != len(input_ids):
            raise ConfigError("attention_mask marks every token of a question as padding")
        images = Memory(seen.flatten(0, 1)[None], (seen.shape[1],) * len(seen))
        hidden = self.encoder_stack(
            rows.pack(input_ids), positions=packed_positions(rows.lengths, row.device),
            longest=longest, layout=ops.Layout(rows.lengths), memory=images,
        )  # fmt: skip
        return Memory(hidden, rows.lengths)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ReaderOutput:
        """`labels` [B, T], the answers, are not shifted (-100: none)."""
        if input_ids is None or (decoder_input_ids is None and labels is None):
            raise ConfigError("answers need input_ids and labels or decoder_input_ids; to answer "
                              "a question call generate")  # fmt: skip
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self._written(labels)
        seen = self.look(_pixels(pixel_values), interpolate_pos_encoding)
        memory = self.ask(seen, input_ids, attention_mask)
        logits = self.head(self.decode(memory, decoder_input_ids, decoder_attention_mask))
        return ReaderOutput(None if labels is None else self._loss(logits, labels), logits, seen)

    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> Any:
        """Answers [B, T] to the questions; options of `topwork.generation.generate`."""
        if input_ids is None:
            raise ConfigError("there is no question: input_ids were not given")
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                seen = self.look(_pixels(pixel_values), interpolate_pos_encoding)
                memory = self.ask(seen, input_ids, attention_mask)
                ids = torch.full((len(seen), 1), self.start, device=seen.device)
                return self._generated(memory, ids, None, options)
        finally:
            self.train(was_training)
