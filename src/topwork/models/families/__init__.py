"""One file per model_type; the file's name registers it (names with `_` in front are shared parts).

A hyphen of the model_type is an underscore in the file's name (`deberta-v2`: `deberta_v2.py`).

A family file has `CASES`, the options that it acts on, and either

- `spec(read) -> DecoderSpec`: a Llama-shaped decoder, or
- `MODELS`: task name → a class made as `cls(config, read)`, where the family has its own tree.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def family(model_type: str) -> ModuleType:
    """The file of one of `NAMES`."""
    return importlib.import_module(f"{__name__}.{model_type}")
