"""What a run came to, as scripts ask for it: numbers, lines, files; and hooks that have no place
here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from topwork.errors import ConfigError

# Methods that a subclass may define elsewhere and that are not called here → what to do instead.
UNCALLED = {
    "training_step": "override compute_loss of Trainer",
    "prediction_step": "pass preprocess_logits_for_metrics, or override predict",
    "evaluation_loop": "override evaluate",
    "get_train_dataloader": "give the rows in the order you want, with shuffle=False",
    "get_eval_dataloader": "pass eval_dataset",
    "get_batch_samples": "give the rows in the order you want, with shuffle=False",
    "_get_train_sampler": "give the rows in the order you want, with shuffle=False",
    "create_scheduler": "pass optimizers=(optimizer, scheduler)",
    "create_optimizer_and_scheduler": "pass optimizers=(optimizer, scheduler)",
    "compute_loss": "Trainer takes any loss; this trainer's is that of its objective",
}


class TrainOutput(NamedTuple):
    """What `train` returns; `training_loss` is the mean over all steps."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


def speed(seconds: float, samples: int, steps: int) -> dict[str, float]:
    """How long it took, and how much that is a second."""
    per = 1 / max(seconds, 1e-9)
    return {
        "runtime": round(seconds, 4),
        "samples_per_second": round(samples * per, 3),
        "steps_per_second": round(steps * per, 3),
    }


def steps_of(samples: int, size: int) -> int:
    return math.ceil(samples / size)


def lines_of(split: str, metrics: Mapping[str, Any]) -> list[str]:
    """A split's metrics, one a line."""
    width = max((len(name) for name in metrics), default=0)
    shown = ((n, f"{v:.4f}" if isinstance(v, float) else f"{v}") for n, v in metrics.items())
    return [f"{split}:", *(f"  {name:<{width}} = {value}" for name, value in sorted(shown))]


def save_metrics(home: Path, split: str, metrics: Mapping[str, Any], combined: bool) -> None:
    """Write `home`/SPLIT_results.json, and with `combined` add to all_results.json."""
    home.mkdir(parents=True, exist_ok=True)
    _write(home / f"{split}_results.json", metrics)
    if combined:
        path = home / "all_results.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _write(path, {**before, **metrics})


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_overrides(cls: type) -> None:
    """ConfigError for a method of a user's class that would silently never be called."""
    ours = next(c for c in cls.__mro__ if c.__module__.startswith("topwork."))
    for part in cls.__mro__[: cls.__mro__.index(ours)]:
        for name, instead in UNCALLED.items():
            called = name == "compute_loss" and hasattr(ours, name)
            if name in vars(part) and not called:
                raise ConfigError(f"{part.__name__}.{name} would never be called here: {instead}")
