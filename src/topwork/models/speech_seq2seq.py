"""Speech to text with an encoder that reads a spectrogram and a decoder that writes (Whisper).

x = gelu(conv2(gelu(conv1(spectrogram)))) + places;   then both stacks as in `seq2seq.py`
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.base import Model
from topwork.models.config import Config
from topwork.models.heads import ClassifierOutput, classification_loss, label_count
from topwork.models.seq2seq import Seq2SeqModel, Seq2SeqOutput, Seq2SeqSpec, as_memory
from topwork.models.stack import DecoderCache, Memory, Stack, StackSpec
from topwork.nn.paths import part
from topwork.nn.spans import Augment
from topwork.weights import Table

STRIDE = 2  # frames of the spectrogram in one state of the encoder


class SpectrogramStack(Stack):
    """The encoder's stack behind two convolutions, the second of which halves the frames."""

    def __init__(self, spec: StackSpec, bins: int, augment: Augment | None) -> None:
        super().__init__(spec)
        self.bins, self.augment = bins, augment
        self.conv1 = nn.Conv1d(bins, spec.hidden, 3, padding=1)
        self.conv2 = nn.Conv1d(spec.hidden, spec.hidden, 3, stride=STRIDE, padding=1)

    def read(
        self, spectrogram: Tensor, mask: Tensor | None = None, states: list[Tensor] | None = None
    ) -> Tensor:
        """[B, bins, frames] → [B, frames / 2, C]. `mask` [B, frames] tells augmentation where the
        sound ends; nothing else is masked."""
        frames = STRIDE * self.spec.context
        if spectrogram.dim() != 3 or spectrogram.shape[1:] != (self.bins, frames):
            raise ConfigError(
                f"input_features must be [batch, {self.bins}, {frames}], got "
                f"{list(spectrogram.shape)}: pad or cut the sound to {frames} frames (the feature "
                "extractor does)"
            )
        spectrogram = self._augmented(spectrogram, mask)
        x = F.gelu(self.conv1(spectrogram.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        places = torch.arange(x.shape[1], device=x.device)[None]
        return self(
            None, inputs_embeds=x, positions=places, longest=x.shape[1], layout=ops.Layout(),
            states=states,
        )  # fmt: skip

    def _augmented(self, spectrogram: Tensor, mask: Tensor | None) -> Tensor:
        if self.augment is None or not self.training:
            return spectrogram
        rows, bins, frames = spectrogram.shape
        if self.augment.time is not None:
            sizes = [frames] * rows if mask is None else mask.sum(1).tolist()
            hidden = self.augment.time.draw(sizes, frames, "time").to(spectrogram.device)
            spectrogram = spectrogram.masked_fill(hidden[:, None], 0.0)
        if self.augment.features is not None:
            hidden = self.augment.features.draw([bins] * rows, bins, "feature")
            spectrogram = spectrogram.masked_fill(hidden[:, :, None].to(spectrogram.device), 0.0)
        return spectrogram


class SpeechSeq2Seq(Seq2SeqModel):
    """Writes down what is said in a spectrogram."""

    task = "speech-seq2seq"

    def __init__(
        self, config: Config, spec: Seq2SeqSpec, bins: int, augment: Augment | None = None
    ) -> None:
        super().__init__(config, spec, SpectrogramStack(spec.encoder, bins, augment))

    @property
    def encoder_stack(self) -> SpectrogramStack:
        return super().encoder_stack  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        return part(self.decoder_stack, self.spec.decoder.names.words)

    def freeze_encoder(self) -> None:
        """Train the decoder alone."""
        self.encoder_stack.requires_grad_(False)

    def listen(self, input_features: Tensor, attention_mask: Tensor | None = None) -> Memory:
        """The memory of spectrograms [B, bins, frames]."""
        return Memory(self.encoder_stack.read(input_features, attention_mask))

    def attention_to_memory(
        self, memory: Memory, ids: Tensor, heads: Sequence[tuple[int, int]]
    ) -> Tensor:
        """How much each of `ids` [1, T] looks at each state, by (layer, head): [heads, T, S]."""
        states: list[Tensor] = []
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        self.decoder_stack(
            ids, positions=places, longest=ids.shape[1], layout=ops.Layout(), memory=memory,
            states=states,
        )  # fmt: skip
        blocks = self.decoder_stack.blocks
        looks = {n: blocks[n].looks(states[n], memory.hidden)[0] for n in {n for n, _ in heads}}
        return torch.stack([looks[layer][head] for layer, head in heads])

    def forward(  # type: ignore[override]
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_inputs_embeds: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        use_cache: bool = False,
    ) -> Seq2SeqOutput:
        """`input_features` [B, bins, frames]; `labels` [B, T] (-100: none) also give the decoder's
        input, when that is not given. All of the sound is looked at, silence too; `attention_mask`
        [B, frames] only bounds what training hides."""
        memory = as_memory(encoder_outputs, None)
        if memory is None and past_key_values is None:
            if input_features is None:
                raise ConfigError("a speech model needs input_features or encoder_outputs")
            memory = self.listen(input_features, attention_mask)
        return super().forward(
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            labels=labels,
            encoder_outputs=memory,
            decoder_inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )

    def generate(  # type: ignore[override]
        self, input_features: Tensor | None = None, **options: Any
    ) -> Any:
        """What is said, as token ids; see `topwork.generation.transcribe`."""
        transcribe = importlib.import_module("topwork.generation.transcribe").transcribe
        return transcribe(self, input_features, **options)


class SpectrogramClassifier(Model):
    """A class for each sound, from the mean of the encoder's states.

    `weighted`: from a learned mix of what all blocks are given and the last state.
    """

    task = "audio-classification"

    def __init__(self, config: Config, stack: SpectrogramStack, width: int, weighted: bool) -> None:
        super().__init__(config)
        fresh = (r"^projector\.", r"^classifier\.", r"^layer_weights$")
        drop = (r"^(model\.)?decoder\.", r"^proj_out\.")
        self.table = Table(prefix="model.", drop=drop, fresh=fresh)
        self.encoder = stack
        count = stack.spec.count + 1
        if weighted:
            self.layer_weights = nn.Parameter(torch.full((count,), 1 / count))
        self.weighted = weighted
        self.projector = nn.Linear(stack.spec.hidden, width)
        self.classifier = nn.Linear(width, label_count(config))

    @property
    def trunk(self) -> SpectrogramStack:
        return self.encoder

    @property
    def layer_count(self) -> int:
        return self.encoder.spec.count

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.conv1

    def freeze_encoder(self) -> None:
        """Train the head alone."""
        self.encoder.requires_grad_(False)

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ClassifierOutput:
        """`input_features` [B, bins, frames], `labels` [B]."""
        states: list[Tensor] | None = [] if self.weighted else None
        x = self.encoder.read(input_features, attention_mask, states)
        if states is not None:
            x = mixed([*states, x], self.layer_weights)
        logits = self.classifier(self.projector(x).mean(1))
        problem = "single_label_classification"
        loss = None if labels is None else classification_loss(logits, labels, problem)
        return ClassifierOutput(loss, logits)


def mixed(states: list[Tensor], weights: Tensor) -> Tensor:
    """The mean of `states`, each [B, T, C], weighted by the softmax of `weights`."""
    return (torch.stack(states, -1) * weights.softmax(-1)).sum(-1)
