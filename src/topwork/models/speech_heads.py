"""What stands on an encoder of raw sound: letters by frame (CTC), a class for each sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.models.base import Model
from topwork.models.config import Config, ConfigReader
from topwork.models.heads import ClassifierOutput, classification_loss, label_count
from topwork.models.output import Output
from topwork.models.speech import Blocks, SpeechEncoder, SpeechSpec, names_on_disk
from topwork.models.speech_seq2seq import mixed


class _OnSpeech(Model):
    """A `SpeechEncoder` under its name on the Hub, and a head."""

    def __init__(self, config: Config, spec: SpeechSpec, own: tuple[str, ...]) -> None:
        super().__init__(config)
        self.home, self.table = spec.prefix, names_on_disk(spec.prefix, own)
        self.add_module(spec.prefix, SpeechEncoder(config, spec))

    @property
    def ear(self) -> SpeechEncoder:
        return getattr(self, self.home)

    @property
    def trunk(self) -> Blocks:
        return self.ear.encoder

    @property
    def layer_count(self) -> int:
        return self.ear.layer_count

    def get_input_embeddings(self) -> nn.Module:
        return self.ear.get_input_embeddings()

    def freeze_feature_encoder(self) -> None:
        """Keep the convolutions over the samples as they are."""
        self.ear.freeze_feature_encoder()


@dataclass
class CtcOutput(Output):
    """`logits` [B, T, V] of each frame; `loss` when labels were given; `sizes`: real frames."""

    loss: Tensor | None
    logits: Tensor
    sizes: list[int]


class SpeechForCtc(_OnSpeech):
    """Letters by frame; the blank is the padding token (CTC, Graves et al. 2006)."""

    task = "ctc"

    def __init__(self, config: Config, spec: SpeechSpec, dropout: float) -> None:
        super().__init__(config, spec, ("lm_head",))
        self.dropout = dropout
        self.lm_head = nn.Linear(spec.output, config.get("vocab_size", 32))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
    ) -> CtcOutput:
        """`labels` [B, U] of letters, filled up with -100 or the blank."""
        heard = self.ear.hear(input_values, attention_mask, mask_time_indices)
        x = F.dropout(heard.hidden, self.dropout, self.training)
        logits = self.lm_head(x)
        sizes = heard.sizes or [logits.shape[1]] * len(logits)
        loss = None if labels is None else self._loss(logits, sizes, labels)
        return CtcOutput(loss, logits, sizes)

    def _loss(self, logits: Tensor, sizes: list[int], labels: Tensor) -> Tensor:
        get = self.config.get
        blank, vocab = get("pad_token_id", 0), logits.shape[-1]
        if bool((labels >= vocab).any()):
            raise ConfigError(f"a label is {int(labels.max())}: the model has {vocab} letters")
        real = (labels >= 0) & (labels != blank)
        return F.ctc_loss(
            logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1),
            labels[real],
            torch.tensor(sizes),
            real.sum(1).cpu(),
            blank=blank,
            reduction=get("ctc_loss_reduction", "sum"),
            zero_infinity=get("ctc_zero_infinity", False),
        )


class SpeechClassifier(_OnSpeech):
    """A class for each sound, from the mean of its states (`weighted`: of a learned mix of all)."""

    task = "audio-classification"

    def __init__(self, config: Config, spec: SpeechSpec, width: int, weighted: bool) -> None:
        super().__init__(config, spec, ("projector", "classifier", "layer_weights"))
        if spec.shortener is not None:
            raise ConfigError("add_adapter=True: a classifier of sounds has no use for it")
        self.weighted = weighted
        if weighted:
            count = spec.count + 1
            self.layer_weights = nn.Parameter(torch.full((count,), 1 / count))
        self.projector = nn.Linear(spec.hidden, width)
        self.classifier = nn.Linear(width, label_count(config))

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ClassifierOutput:
        """Rows of samples [B, N] with their mask; `labels` [B]."""
        states: list[Tensor] | None = [] if self.weighted else None
        heard = self.ear.hear(input_values, attention_mask, states=states)
        x = heard.hidden if states is None else mixed(states, self.layer_weights)
        x, sizes = self.projector(x), heard.sizes
        if sizes is None:
            pooled = x.mean(1)
        else:
            pooled = torch.stack([row[:n].mean(0) for row, n in zip(x, sizes)])
        logits = self.classifier(pooled)
        problem = "single_label_classification"
        loss = None if labels is None else classification_loss(logits, labels, problem)
        return ClassifierOutput(loss, logits)


def speech_models(spec: Callable[[ConfigReader], SpeechSpec]) -> dict[str, Any]:
    """Task name → the model of a family with `spec(read) -> SpeechSpec`."""

    def classify(config: Config, read: ConfigReader) -> SpeechClassifier:
        width, weighted = read("classifier_proj_size", 256), read("use_weighted_layer_sum", False)
        return SpeechClassifier(config, spec(read), width, bool(weighted))

    return {
        "base": lambda config, read: SpeechEncoder(config, spec(read)),
        "ctc": lambda config, read: SpeechForCtc(config, spec(read), read("final_dropout", 0.1)),
        "audio-classification": classify,
    }
