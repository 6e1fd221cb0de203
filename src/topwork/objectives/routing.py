"""The load-balancing loss of a model's routers beside an objective's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch
from topwork.nn.moe import balance, router_logits
from topwork.objectives.setup import router_weight
from topwork.training import Loss


@dataclass(frozen=True)
class Routed:
    """What the routers of `model` say in one pass over `batch`, and what that weighs."""

    model: nn.Module
    batch: Batch
    weight: float
    logits: Sequence[Tensor]

    def beside(self, loss: Loss, units: float) -> Loss:
        """`loss` with the routers' in its first term, which is over `units`."""
        if not self.weight:
            return loss
        logits = self.logits
        if any(isinstance(entry, tuple) for entry in self.batch.lengths):
            plain = ops.unshared(self.batch.lengths, logits[0].device)
            logits = [rows[plain.take] for rows in logits]
        found = balance(self.model, logits)
        terms = loss.total.reshape(-1)
        total = torch.cat((terms[:1] + self.weight * units * found, terms[1:]))
        told = {"aux_loss": (float(found.detach()) * units, units)}
        return replace(
            loss, total=total.reshape(loss.total.shape), metrics={**loss.metrics, **told}
        )


@contextmanager
def routed(model: nn.Module, batch: Batch, asked: float | None) -> Iterator[Routed]:
    """Within it `model` passes once over `batch`; what its routers say then counts `asked` times
    (None: as much as the model's configuration says). A prompt that answers share counts with each
    of them, as in rows of their own."""
    weight = router_weight(model, asked)
    if not weight:
        yield Routed(model, batch, 0.0, ())
        return
    with router_logits(model) as logits:
        yield Routed(model, batch, weight, logits)
