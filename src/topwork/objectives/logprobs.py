"""Log-probabilities of a packed batch's targets, from our models and from transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch


@dataclass(frozen=True)
class Scored:
    """What a model says at the N supervised positions of a batch.

    `logprobs` [N] fp32 of the targets. `seen` [N, C] is what `model`'s head makes logits of; for a
    model without Topwork's contract it is the logits themselves.
    """

    logprobs: Tensor
    seen: Tensor
    targets: Tensor
    model: Any

    def statistics(self) -> ops.TokenStatistics:
        """Entropy and the like at each position, for one more pass through the head."""
        head = self.model.head if _has_contract(self.model) else lambda logits: logits
        return ops.token_statistics(head, self.seen.detach(), self.targets)


def score(model: nn.Module, batch: Batch) -> Scored:
    """The supervised positions of `batch` under `model`.

    A model with Topwork's contract (`backbone`, `token_logprobs`) computes no padding, shared
    prompts once, and logits for these positions alone; any other gets padded rows and the familiar
    call.
    """
    any_model: Any = model
    if _has_contract(model):
        hidden = any_model.backbone(batch.input_ids, lengths=batch.lengths)
        seen = hidden[0, batch.positions]
        return Scored(any_model.token_logprobs(seen, batch.targets), seen, batch.targets, model)
    logits = _padded_logits(any_model, batch)[batch.positions].float()
    found = logits.gather(1, batch.targets[:, None])[:, 0] - logits.logsumexp(1)
    return Scored(found, logits, batch.targets, model)


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log p(target) [N] fp32 for each supervised position of `batch`; see `score`."""
    return score(model, batch).logprobs


def _has_contract(model: Any) -> bool:
    return callable(getattr(model, "token_logprobs", None))


def padded(batch: Batch) -> tuple[Tensor, Tensor, ops.Unshared]:
    """Right-padded rows [A, S] of the documents, their mask, and how they lie in the flat row."""
    plain = ops.unshared(batch.lengths, batch.input_ids.device)
    ids, width = batch.input_ids[0, plain.take], max(plain.lengths)
    rows = ids.new_zeros(len(plain.lengths), width)
    keep = torch.zeros_like(rows)
    for i, part in enumerate(ids.split(plain.lengths)):
        rows[i, : len(part)], keep[i, : len(part)] = part, 1
    return rows, keep, plain


def _padded_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [T, V] of the flat row through right-padded rows."""
    rows, keep, plain = padded(batch)
    logits = model(input_ids=rows, attention_mask=keep).logits[keep.bool()]
    return logits[plain.back]
