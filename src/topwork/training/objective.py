"""What an objective owes the trainer: samples, micro-batches, and a loss that is a sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch as a SUM over its units (tokens, pairs …).

    The trainer divides by the units of the whole step, over all micro-batches and devices, so a
    loss does not depend on how the step is cut. `metrics`: name → (sum, count), averaged likewise.
    """

    total: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


class Objective(Protocol):
    """An algorithm over the one trainer: SFT, DPO, GRPO … Samples and batches are its own."""

    def assemble(self, model: nn.Module, groups: Sequence[Sequence[Any]]) -> list[Any]:
        """The micro-batches of one step, one for each group of samples."""
        ...

    def size(self, sample: Any) -> int:
        """Tokens of one sample, to plan the memory."""
        ...

    def weight(self, batch: Any) -> float:
        """Units of `batch` that the loss is normalised by (supervised tokens, pairs …)."""
        ...

    def tokens(self, batch: Any) -> int:
        """Tokens that are computed for `batch`, none of them padding."""
        ...

    def rows(self, batch: Any) -> Sequence[int]:
        """The numbers of the rows in `batch`, to name them in errors."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """The summed loss, differentiable."""
        ...
