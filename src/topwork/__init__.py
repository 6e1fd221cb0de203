"""Topwork: load, adapt, train and talk to open models on small hardware."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from topwork._public import HOMES
from topwork._version import __version__

if TYPE_CHECKING:
    from topwork.data import *
    from topwork.generation import *
    from topwork.media import *
    from topwork.models import *
    from topwork.objectives import *
    from topwork.peft import *
    from topwork.pipelines import *
    from topwork.quant import BitsAndBytesConfig
    from topwork.text import *
    from topwork.training import (  # its Trainer is the loop below all others
        EarlyStoppingCallback,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
        get_constant_schedule,
        get_constant_schedule_with_warmup,
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
        get_scheduler,
        set_seed,
    )

# Modules are read on first use, so that `import topwork` loads no torch.
__all__ = sorted([*HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        if name.startswith("_"):
            raise AttributeError(f"module 'topwork' has no attribute {name!r}")
        return importlib.import_module("topwork._familiar").find(name)
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
