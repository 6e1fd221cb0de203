"""Models over any trunk: bare hidden states, and a class for each text or each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError, nearest
from topwork.models.base import Model, backbone
from topwork.models.config import Config
from topwork.models.output import Output
from topwork.models.packing import document_ends
from topwork.models.states import block_inputs, hidden_states, refuse_attentions
from topwork.nn.cache import KVCache
from topwork.weights import Table

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class BaseOutput(Output):
    """`last_hidden_state` [B, T, C] after the final norm; `hidden_states`, when asked for: what
    each block was given, and the last."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class ClassifierOutput(Output):
    """`logits` [B, labels] of texts or [B, T, labels] of tokens; `loss` when labels were given;
    `hidden_states` as in BaseOutput."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class HeadOutput(ClassifierOutput):
    """The same, which of a question answerer also tells start and end [B, T] apart."""

    @property
    def start_logits(self) -> Tensor:
        return self.logits[..., 0]

    @property
    def end_logits(self) -> Tensor:
        return self.logits[..., 1]


def label_count(config: Config) -> int:
    """How many labels a classifier of this configuration has (two when it names none)."""
    named = config.get("id2label")
    return len(named) if named else int(config.get("num_labels", 2))


def classification_loss(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """The loss of `logits` [N, labels]; `problem` None is told by the labels, as the peer does.

    One label, or "regression": squared error. Integer labels: cross-entropy (-100 is left out).
    Floating labels [N, labels]: a yes or no for each.
    """
    if problem is None:
        if logits.shape[-1] == 1:
            problem = PROBLEMS[0]
        else:
            problem = PROBLEMS[2] if labels.is_floating_point() else PROBLEMS[1]
    if problem not in PROBLEMS:
        raise ConfigError(f"problem_type={problem!r} is not known{nearest(problem, PROBLEMS)}")
    logits = logits.float()
    if problem == "regression":
        return F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
    if problem == "single_label_classification":
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def answer_loss(
    logits: Tensor,
    where: tuple[Tensor, Tensor],
    lengths: tuple[int, ...] | None,
    real: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of start and end; an answer outside of its text does not count.

    `logits` [B, T, 2], whose padding is not `real` [B, T], or of packed texts of `lengths`.
    """
    if lengths is None:
        lengths = (logits.shape[1],) * logits.shape[0]
    texts = torch.split(logits.flatten(0, 1).float(), list(lengths))
    table = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=float("-inf"))
    if real is not None:
        table = table.masked_fill(~real[..., None], float("-inf"))
    sizes = torch.tensor(lengths, device=logits.device)
    losses = []
    for side, at in enumerate(where):
        at = at.flatten()
        inside = (at >= 0) & (at < sizes)
        if real is not None:
            inside &= real.gather(1, at.clamp(0, real.shape[1] - 1)[:, None])[:, 0]
        target = torch.where(inside, at, -100)
        losses.append(F.cross_entropy(table[..., side], target, ignore_index=-100))
    return (losses[0] + losses[1]) / 2


def last_tokens(
    batch: int,
    tokens: int,
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    lengths: ops.Lengths | None,
    pad: int | None,
) -> tuple[Tensor, Tensor]:
    """Row and column of each text's last token that is no padding."""
    if lengths is not None:
        ends = document_ends(lengths, torch.device("cpu"))
        return torch.zeros_like(ends), ends
    rows = torch.arange(batch)
    if attention_mask is not None:
        real = attention_mask.bool()
    elif pad is not None and input_ids is not None:
        real = input_ids != pad
    elif batch == 1 or input_ids is None:
        return rows, torch.full((batch,), tokens - 1)
    else:
        raise ConfigError(
            f"a batch of {batch} texts needs attention_mask, or pad_token_id in the configuration, "
            "to tell where each text ends"
        )
    columns = torch.arange(tokens, device=real.device)
    return rows.to(real.device), (columns * real).argmax(1)


class _OneTrunk(Model):
    """A trunk under its name on the Hub and a linear head beside it."""

    def __init__(
        self,
        config: Config,
        trunk: Any,
        *,
        table: Table,
        home: str = "model",
        head: str = "score",
        bias: bool = False,
        count: int | None = None,
    ) -> None:
        super().__init__(config)
        self.home, self.head_name, self.table = home, head, table
        self.add_module(home, trunk)
        width = trunk.spec.hidden if hasattr(trunk, "spec") else config.hidden_size
        self.add_module(head, nn.Linear(width, count or label_count(config), bias=bias))

    backbone = backbone

    @property
    def trunk(self) -> Any:
        return getattr(self, self.home)

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    def head(self, hidden: Tensor) -> Tensor:
        return getattr(self, self.head_name)(hidden)


class SequenceClassifier(_OneTrunk):
    """A class for each text, from its last token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        lengths: ops.Lengths | None = None,
    ) -> ClassifierOutput:
        """`labels`: [B] of classes, or of values (regression), or [B, labels] of yes and no."""
        hidden = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            positions=position_ids,
            lengths=lengths,
            attention_mask=attention_mask,
        )
        rows, columns = last_tokens(
            *hidden.shape[:2],
            input_ids=input_ids,
            attention_mask=attention_mask,
            lengths=lengths,
            pad=self.config.get("pad_token_id"),
        )
        logits = self.head(hidden[rows, columns])
        problem = self.config.get("problem_type")
        loss = None if labels is None else classification_loss(logits, labels, problem)
        return ClassifierOutput(loss, logits)


class TokenClassifier(_OneTrunk):
    """A class for each token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        lengths: ops.Lengths | None = None,
    ) -> ClassifierOutput:
        """`labels` [B, T] of classes; -100 marks tokens without loss."""
        hidden = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            positions=position_ids,
            lengths=lengths,
            attention_mask=attention_mask,
        )
        rates = (self.config.get("classifier_dropout"), self.config.get("hidden_dropout"), 0.1)
        rate = next(rate for rate in rates if rate is not None)
        logits = self.head(F.dropout(hidden, rate, self.training))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return ClassifierOutput(loss, logits)


class QuestionAnswerer(_OneTrunk):
    """Where in each text the answer to a question starts and ends."""

    task = "question-answering"

    def __init__(self, config: Config, trunk: Any, *, table: Table, home: str) -> None:
        super().__init__(
            config, trunk, table=table, home=home, head="qa_outputs", bias=True, count=2
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> HeadOutput:
        """`start_positions`, `end_positions` [B]: where the answer's first and last token stand."""
        hidden = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            positions=position_ids,
            lengths=lengths,
            attention_mask=attention_mask,
        )
        logits, loss = self.head(hidden), None
        if start_positions is not None and end_positions is not None:
            real = None if attention_mask is None else attention_mask.bool()
            loss = answer_loss(logits, (start_positions, end_positions), lengths, real)
        return HeadOutput(loss, logits)


class BareModel(Model):
    """The trunk alone, under the names that its tensors have without a head around it."""

    def __init__(self, config: Config, trunk: Any, *, table: Table) -> None:
        super().__init__(config)
        self.table = table
        # One set of parts with two faces: the trunk computes, this model is called and saved. The
        # trunk is no child, or its name would stand in front of every tensor's.
        self.__dict__["bare"] = trunk
        self._modules, self._parameters = trunk._modules, trunk._parameters
        self._buffers = trunk._buffers

    backbone = backbone

    @property
    def trunk(self) -> Any:
        return self.__dict__["bare"]

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    def train(self, mode: bool = True) -> BareModel:
        self.trunk.train(mode)
        return super().train(mode)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        lengths: ops.Lengths | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseOutput:
        refuse_attentions(output_attentions)
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache()
        with block_inputs(self.trunk, output_hidden_states) as found:
            hidden = self.backbone(
                input_ids,
                inputs_embeds=inputs_embeds,
                positions=position_ids,
                lengths=lengths,
                attention_mask=attention_mask,
                cache=cache,
            )
        states = hidden_states(found, hidden, attention_mask) if output_hidden_states else None
        return BaseOutput(hidden, cache, states)
