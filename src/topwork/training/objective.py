"""What an objective owes the trainer: samples, micro-batches, and a loss that is a sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from topwork.training.distributed import World


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch as a SUM over its units (tokens, pairs …).

    The trainer divides by the units of the whole step, over all micro-batches and devices, so a
    loss does not depend on how the step is cut. A loss of several terms, each over units of its
    own, is a `total` [terms]. `metrics`: name → (sum, count), averaged likewise.
    """

    total: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def over(self, units: Sequence[float]) -> Tensor:
        """Each term divided by its units, summed; a term without units is nothing."""
        divisors = self.total.new_tensor([max(u, 1e-12) for u in units])
        return (self.total.reshape(-1) / divisors).sum()


def total_units(weights: Sequence[float | Sequence[float]]) -> list[float]:
    """Units of several micro-batches together, one number for each term of the loss."""
    terms = [(w,) if isinstance(w, (int, float)) else tuple(w) for w in weights]
    return [sum(column) for column in zip(*terms)]


def penalty(model: Any, objective: Any, batch: Any, units: Sequence[float]) -> Tensor | float:
    """What the active adapters' methods add to the loss: the batch's share of it in the step."""
    tell = None if getattr(objective, "calls", False) else getattr(model, "penalty", None)
    found = None if tell is None else tell()
    if found is None:
        return 0.0
    own = total_units([objective.weight(batch)])
    return found * (sum(own) / max(sum(units), 1e-12))


@contextmanager
def beside(model: Any) -> Iterator[Callable[[Tensor, Tensor], Tensor | None]]:
    """Within it a call of `model` is remembered by the active adapter, where its method counts a
    loss of its own; what is given tells it, summed, for `targets` [N] at `positions` [N]."""
    told = getattr(model, "beside", None)
    with nullcontext(lambda positions, targets: None) if told is None else told() as tell:
        yield tell


def held_state(objective: Any) -> dict[str, Tensor]:
    """What `objective` holds that changes in training, for checkpoints."""
    state = getattr(objective, "state", None)
    return {k: v.detach() for k, v in state().items()} if state else {}


def take_up(objective: Any, found: dict[str, Tensor]) -> None:
    """Put a checkpoint's tensors back."""
    load = getattr(objective, "load_state", None)
    if load is not None:
        load(found)
        return
    for name, tensor in held_state(objective).items():
        tensor.copy_(found[name])


class Objective(Protocol):
    """An algorithm over the one trainer: SFT, DPO, GRPO … Samples and batches are its own.

    One that holds tensors which change in training (a reference that follows the model) also has
    `state()` → {name: tensor}; checkpoints keep them, and a resumed run copies them back, or gives
    them to `load_state` where there is that (for tensors whose shapes it cannot know). One whose
    batches are drawn (rollouts) has `draws` = True, so that a run is stopped between steps only;
    `sketch(model, sample)`, a batch of the usual shape made without drawing, to plan the memory;
    `repeat`, how many steps take the same samples; `calls` = True, when its loss is that of the
    model's own call, in which an adapter's penalty is counted already; `answers`, how many items of
    the batch size one sample stands for; and `prompt(sample)`, what a sample says before it is to
    be answered (a row without a trained token, its images read by the objective's `placer`), if
    held-out ones shall be answered for the run's page.
    """

    def assemble(
        self, model: nn.Module, groups: Sequence[Sequence[Any]], world: World | None = None
    ) -> list[Any]:
        """The micro-batches of one step, one for each group of samples.

        `world`: all processes, which take this step together; None outside of training.
        """
        ...

    def size(self, sample: Any) -> int:
        """Tokens of one sample, to plan the memory."""
        ...

    def weight(self, batch: Any) -> float | Sequence[float]:
        """Units of `batch` that the loss (each of its terms) is normalised by."""
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
