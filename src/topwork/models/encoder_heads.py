"""What stands on an encoder: masked words, classes of texts and tokens, answers, choices.

Every head is   out(dropout(norm(act(dense(x)))))   of each token, or of one vector per text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.models.base import Model
from topwork.models.config import Config, ConfigReader
from topwork.models.encoder import Encoder, EncoderSpec, unpadded
from topwork.models.heads import HeadOutput, answer_loss, classification_loss, label_count
from topwork.models.pooling import first_tokens, mean_tokens
from topwork.models.states import block_inputs, hidden_states, refuse_attentions
from topwork.nn.layers import ACTIVATIONS
from topwork.nn.paths import part, place
from topwork.weights import Rename, Table

POOLINGS = {"first": first_tokens, "mean": mean_tokens}


@dataclass(frozen=True)
class HeadSpec:
    """One head: where its parts stand, and how a text becomes one vector (`pool`; None: it stays).

    `bias`: where the checkpoint keeps the bias of `out` beside it (masked language models).
    `width`: what `dense` gives. `dropout` before `out`, `drop_first` before `dense`.
    """

    out: str
    dense: str | None = None
    activation: str = "gelu"
    norm: str | None = None
    norm_bias: bool = True
    dense_bias: bool = True
    out_bias: bool = True
    bias: str | None = None
    width: int | None = None
    pool: str | None = None
    dropout: float = 0.0
    drop_first: float = 0.0


@dataclass(frozen=True)
class FamilySpec:
    """An encoder, the name it has below a head, and the family's heads by task.

    `drop`: further paths of the family's files that no model here has.
    """

    prefix: str
    encoder: EncoderSpec
    heads: dict[str, HeadSpec] = field(hash=False)
    tied: bool = True
    drop: tuple[str, ...] = ()


# TensorFlow's names for a norm's weight and bias, as in the first BERT files.
OLD_NAMES = (
    Rename("LayerNorm.gamma", "LayerNorm.weight"),
    Rename("LayerNorm.beta", "LayerNorm.bias"),
)


def names_on_disk(family: FamilySpec, task: str) -> Table:
    """Where the tensors stand in the family's files, whichever head those were saved with.

    The encoder may stand there with or without its prefix; heads of other tasks are left out, and
    a head or pooler that is not there starts fresh.
    """
    paths = {family.encoder.pooler, *family.drop}
    for head in family.heads.values():
        paths |= {head.out, head.dense, head.norm, head.bias}
    inner = [path.removeprefix(family.prefix + ".") for path in paths if path]
    others = tuple(rf"^({family.prefix}\.)?{re.escape(path)}(\.|$)" for path in sorted(inner))
    here = family.heads.get(task)
    own = [here.out, here.dense, here.norm, here.bias] if here else [family.encoder.pooler]
    fresh = tuple(rf"^{re.escape(path)}(\.|$)" for path in own if path)
    buffers = (r"embeddings\.position_ids$", r"embeddings\.token_type_ids$", r"inv_freq$")
    return Table(old=OLD_NAMES, drop=(*others, *buffers), prefix=family.prefix + ".", fresh=fresh)


class EncoderWithHead(Model):
    """An encoder under its name on the Hub, and one head."""

    def __init__(self, config: Config, family: FamilySpec, task: str) -> None:
        super().__init__(config)
        self.task = task
        self.table = names_on_disk(family, task)
        self.head_spec = head = family.heads[task]
        self.prefix = family.prefix
        spec = family.encoder
        pooler = f"{family.prefix}.{spec.pooler}"
        self.add_module(family.prefix, Encoder(config, spec, pooled=head.dense == pooler))
        width = spec.hidden
        if head.dense is not None:
            width = head.width or spec.hidden
            if head.dense != pooler:
                place(self, head.dense, nn.Linear(spec.hidden, width, bias=head.dense_bias))
        if head.norm is not None:
            place(self, head.norm, nn.LayerNorm(width, spec.eps, bias=head.norm_bias))
        count = {
            "masked-lm": spec.embedding.vocab,
            "question-answering": 2,
            "multiple-choice": 1,
        }.get(task) or label_count(config)
        place(self, head.out, nn.Linear(width, count, bias=head.out_bias))
        if head.bias is not None:
            home, _, leaf = head.bias.rpartition(".")
            part(self, home).register_parameter(leaf, nn.Parameter(torch.zeros(count)))
        if task == "masked-lm" and family.tied:
            self.tied[f"{head.out}.weight"] = f"{family.prefix}.{spec.embedding.word}.weight"
            if head.bias is not None:
                self.tied[f"{head.out}.bias"] = head.bias
        self.tie_weights()

    @property
    def trunk(self) -> Encoder:
        return getattr(self, self.prefix)

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return part(self, self.head_spec.out) if self.task == "masked-lm" else None

    def logits_of(self, x: Tensor) -> Tensor:
        """Logits [..., labels] of hidden states or pooled texts [..., C]."""
        spec = self.head_spec
        x = F.dropout(x, spec.drop_first, self.training)
        if spec.dense is not None:
            x = ACTIVATIONS[spec.activation](part(self, spec.dense)(x))
        if spec.norm is not None:
            x = part(self, spec.norm)(x)
        return part(self, spec.out)(F.dropout(x, spec.dropout, self.training))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> HeadOutput:
        """Padded rows [B, T] with their mask, or texts packed in one row with their `lengths`.

        `labels`: per token [B, T] (-100: none), or per text [B] (for several labels, or numbers,
        [B, labels]); of a question's answer `start_positions` and `end_positions` [B]. Multiple
        choice takes rows [B, choices, T]. Padding comes back with logits of zero.
        """
        refuse_attentions(output_attentions)
        batch = None
        if self.task == "multiple-choice" and lengths is None:
            given = [input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds]
            batch = next(t.shape[0] for t in (input_ids, inputs_embeds) if t is not None)
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if t is None else t.flatten(0, 1) for t in given
            )
        rows, texts = unpadded(
            self.trunk, attention_mask, lengths, input_ids, token_type_ids, position_ids,
            inputs_embeds,
        )  # fmt: skip
        lengths = texts["lengths"]
        with block_inputs(self.trunk, output_hidden_states) as found:
            hidden = self.trunk.encode(**texts)
        pool = self.head_spec.pool
        logits = self.logits_of(hidden if pool is None else POOLINGS[pool](hidden, lengths))
        if batch is not None:
            logits = logits.view(batch, -1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = answer_loss(logits, (start_positions, end_positions), lengths)
        elif labels is not None:
            if rows is not None and pool is None:
                labels = rows.pack(labels)
            texts_only = self.task == "sequence-classification"
            problem = (
                self.config.get("problem_type") if texts_only else "single_label_classification"
            )
            loss = classification_loss(logits, labels, problem)
        if rows is not None and pool is None:
            logits = rows.unpack(logits)
        states = None
        if output_hidden_states:
            whole = hidden if rows is None else rows.unpack(hidden)
            states = hidden_states(found, whole, attention_mask)
        return HeadOutput(loss, logits, states)


def encoder_models(family: Callable[[ConfigReader], FamilySpec]) -> dict[str, Any]:
    """Task name → the model of an encoder's family, made as `cls(config, read)`."""
    tasks = ("masked-lm", "sequence-classification", "token-classification",
             "question-answering", "multiple-choice")  # fmt: skip

    def headed(task: str) -> Callable[[Config, ConfigReader], EncoderWithHead]:
        return lambda config, read: EncoderWithHead(config, family(read), task)

    def bare(config: Config, read: ConfigReader) -> Encoder:
        found = family(read)
        encoder = Encoder(config, found.encoder)
        encoder.table = names_on_disk(found, "base")
        return encoder

    return {"base": bare, **{task: headed(task) for task in tasks}}
