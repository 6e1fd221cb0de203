"""Log-probabilities of a packed batch's targets, from our models and from transformers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log p(target) [N] fp32 for each supervised position of `batch`.

    A model with Topwork's contract (`backbone`, `token_logprobs`) computes no padding, shared
    prompts once, and logits for these positions alone; any other gets padded rows and the familiar
    call.
    """
    any_model: Any = model
    if callable(getattr(model, "token_logprobs", None)):
        hidden = any_model.backbone(batch.input_ids, lengths=batch.lengths)
        return any_model.token_logprobs(hidden[0, batch.positions], batch.targets)
    logits = _padded_logits(any_model, batch)[batch.positions].float()
    return logits.gather(1, batch.targets[:, None])[:, 0] - logits.logsumexp(1)


def _padded_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [T, V] of the flat row through right-padded rows."""
    plain = ops.unshared(batch.lengths, batch.input_ids.device)
    ids, width = batch.input_ids[0, plain.take], max(plain.lengths)
    rows = ids.new_zeros(len(plain.lengths), width)
    keep = torch.zeros_like(rows)
    for i, part in enumerate(ids.split(plain.lengths)):
        rows[i, : len(part)], keep[i, : len(part)] = part, 1
    logits = model(input_ids=rows, attention_mask=keep).logits[keep.bool()]
    return logits[plain.back]
