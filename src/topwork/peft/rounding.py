"""What a merge into quantised weights loses, measured and told."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from topwork.errors import TopworkWarning


@dataclass(frozen=True)
class Rounding:
    """Of one layer: by how much its outputs move, as a share of them, for inputs of no preferred
    direction (where E‖x Mᵀ‖² = ‖M‖² E‖x‖² / in).

    `error`: the merged weight rounded again, against the merged weight; `effect`: the adapter.
    """

    path: str
    error: float
    effect: float

    @classmethod
    def of(cls, path: str, base: Any, before: Tensor, wanted: Tensor) -> Rounding | None:
        """What `base` lost of the `wanted` weight; None where it is not quantised."""
        if not hasattr(base, "dequantised_weight"):
            return None
        whole = wanted.norm().clamp_min(1e-30)
        error = (base.dequantised_weight().float() - wanted).norm() / whole
        return cls(path, float(error), float((wanted - before.float()).norm() / whole))


def report(found: Iterable[Rounding | None]) -> None:
    """Warn of what was lost, if anything was, and say how to lose nothing."""
    lost = [one for one in found if one is not None]
    if not lost:
        return
    error, effect = (
        sum(values) / len(lost) for values in zip(*((r.error, r.effect) for r in lost))
    )
    worst = max(lost, key=lambda r: r.error)
    warnings.warn(
        f"merging into {len(lost)} quantised layers rounds their weights again: outputs move by "
        f"{100 * error:.1f} % on the mean ({100 * worst.error:.1f} % in {worst.path}), where the "
        f"adapter moves them by {100 * effect:.1f} %. For a merge that loses nothing call "
        "dequantize() first",
        TopworkWarning,
        stacklevel=4,
    )
