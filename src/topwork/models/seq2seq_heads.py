"""A class for each text from an encoder-decoder, at its last end-of-text token (BART)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.models.config import Config
from topwork.models.heads import ClassifierOutput, classification_loss, label_count
from topwork.models.packing import Padding
from topwork.models.seq2seq import Seq2SeqModel, Seq2SeqSpec
from topwork.nn.paths import part, place
from topwork.weights import Table


class Seq2SeqClassifier(Seq2SeqModel):
    """Reads a text with both halves; the decoder's state at the text's end says the class."""

    task = "sequence-classification"

    def __init__(self, config: Config, spec: Seq2SeqSpec, dropout: float = 0.0) -> None:
        table = Table(
            drop=(r"^final_logits_bias$", r"^lm_head\.weight$"),
            prefix="model.",
            fresh=(r"^classification_head\.",),
        )
        self.dropout = dropout
        super().__init__(config, replace(spec, bias=False, table=table))

    def _add_head(self) -> None:
        width = self.spec.decoder.hidden
        place(self, "classification_head.dense", nn.Linear(width, width))
        place(self, "classification_head.out_proj", nn.Linear(width, label_count(self.config)))

    def get_output_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        return None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> ClassifierOutput:
        """Padded rows [B, T], or texts packed in one row with their `lengths`."""
        if lengths is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            rows = Padding.of(mask)
            input_ids, lengths = rows.pack(input_ids), rows.lengths
        start, eos = (self.config.get(n) for n in ("decoder_start_token_id", "eos_token_id"))
        firsts = torch.tensor(lengths, device=input_ids.device).cumsum(0) - torch.tensor(lengths)
        ids = input_ids.roll(1, 1)
        ids[0, firsts] = start
        memory = self.encode(input_ids, lengths=lengths)
        hidden = self.decode(memory, ids, lengths=lengths)
        ends = []
        for i, (at, row) in enumerate(zip(firsts.tolist(), input_ids[0].split(list(lengths)))):
            found = (row == eos).nonzero().flatten()
            if not len(found):
                raise ConfigError(
                    f"text {i} has no end-of-text token {eos}: its class stands there"
                )
            ends.append(at + int(found[-1]))
        x = F.dropout(hidden[0, ends], self.dropout, self.training)
        x = torch.tanh(part(self, "classification_head.dense")(x))
        logits = part(self, "classification_head.out_proj")(
            F.dropout(x, self.dropout, self.training)
        )
        problem = self.config.get("problem_type")
        loss = None if labels is None else classification_loss(logits, labels, problem)
        return ClassifierOutput(loss, logits)
