"""One file per method; its name in capitals is the peft_type (`lora.py` is LORA).

A file has `CONFIG`, the configuration's class, and either

- `GRAFT`, a `topwork.peft.graft.Graft`: what the method adds to one layer, or
- neither, where it works through adapters of another (`xlora.py`), or
- `PROMPT`, a `topwork.peft.prompts.Prompt`: the virtual tokens that it puts before the input.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from topwork.errors import ConfigError, nearest

NAMES = tuple(
    sorted(m.name.upper() for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
)


def method(peft_type: str) -> ModuleType:
    """The file of a peft_type; ConfigError for one that is not there."""
    if peft_type not in NAMES:
        raise ConfigError(
            f"peft_type {str(peft_type)!r} is not supported{nearest(str(peft_type), NAMES)}; "
            f"there are {', '.join(NAMES)}"
        )
    return importlib.import_module(f"{__name__}.{peft_type.lower()}")


def config_class(peft_type: str) -> Any:
    """The configuration's class of a peft_type."""
    return method(peft_type).CONFIG
