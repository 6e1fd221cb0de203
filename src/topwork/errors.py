"""The errors that users meet. Each names the thing, the place and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TopworkError(Exception):
    """Base of every error that Topwork raises on purpose."""


class ConfigError(TopworkError, ValueError):
    """A configuration, argument or option that cannot be meant."""


class CheckpointError(TopworkError, OSError):
    """A checkpoint, adapter or tokenizer file that is missing, damaged or of the wrong shape."""


class DataError(TopworkError, ValueError):
    """A training row, chat or prompt that cannot be used as it is."""


class TopworkWarning(UserWarning):
    """Something that works, but perhaps not as meant."""


class TrainingError(TopworkError, RuntimeError):
    """A run that cannot go on: a loss that is no number, a step without a trained token."""


def nearest(name: str, choices: Iterable[str], count: int = 1) -> str:
    """`"; nearest: 'q_proj'"` for the closest of `choices`, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=count, cutoff=0.5)
    return "; nearest: " + ", ".join(repr(c) for c in close) if close else ""
