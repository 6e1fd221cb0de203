"""Losses and metrics of many batches as means, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from topwork.errors import ConfigError
from topwork.training.arguments import TrainingArguments
from topwork.training.distributed import World
from topwork.training.objective import Loss, total_units


@dataclass
class Means:
    """Sums and counts by name; each term of a loss has units of its own."""

    sums: dict[str, list[float]] = field(default_factory=lambda: {"loss#0": [0.0, 0.0]})

    def add(self, loss: Loss, weight: float | Sequence[float]) -> None:
        """One batch, whose loss is over `weight` units."""
        terms, units = loss.total.reshape(-1).tolist(), total_units([weight])
        parts = {f"loss#{i}": part for i, part in enumerate(zip(terms, units))}
        for name, (total, count) in {**parts, **loss.metrics}.items():
            old = self.sums.setdefault(name, [0.0, 0.0])
            self.sums[name] = [old[0] + total, old[1] + count]

    def over(self, world: World) -> dict[str, float]:
        """`loss`, the sum of its terms' means, and the metrics' means."""
        names = sorted(self.sums)
        flat = world.total(*(v for n in names for v in self.sums[n]))
        means = {n: flat[2 * i] / max(flat[2 * i + 1], 1e-12) for i, n in enumerate(names)}
        loss = sum(means.pop(n) for n in names if n.startswith("loss#"))
        return {"loss": loss, **means}


def better(
    metrics: Mapping[str, float], best: float | None, args: TrainingArguments
) -> float | None:
    """The value of `metric_for_best_model` among `metrics` if it beats `best`, else None.

    ConfigError when it is not there and the run is to end with the best model.
    """
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    value = metrics.get(name)
    if value is None:
        if args.load_best_model_at_end:
            raise ConfigError(
                f"metric_for_best_model={name!r} is not among the metrics {sorted(metrics)}"
            )
        return None
    sign = 1 if args.greater_is_better else -1
    return value if best is None or sign * (value - best) > 0 else None
