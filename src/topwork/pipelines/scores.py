"""From logits to scores, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from topwork.errors import ConfigError, nearest
from topwork.models.heads import label_count

FUNCTIONS = ("sigmoid", "softmax", "none")


def usual(config: Any) -> str:
    """What makes scores of the logits of a classifier with this configuration."""
    problem = config.get("problem_type")
    if problem == "regression":
        return "none"
    one = label_count(config) == 1
    return "sigmoid" if problem == "multi_label_classification" or one else "softmax"


def checked(function: str) -> str:
    """`function`, one of `FUNCTIONS`; ConfigError otherwise."""
    if function.lower() not in FUNCTIONS:
        raise ConfigError(f"function_to_apply={function!r}{nearest(function, FUNCTIONS)}")
    return function.lower()


def apply(function: str, logits: Tensor) -> Tensor:
    """Scores [..., labels] of logits."""
    if function == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if function == "sigmoid" else logits


def best(
    scores: Sequence[float], label: Callable[[int], str], top_k: int | None
) -> list[dict[str, Any]]:
    """[{"label", "score"}], the highest first; `top_k` None gives all."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    return [{"label": label(i), "score": scores[i]} for i in order]
