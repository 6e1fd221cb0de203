"""What every adapter's configuration shares; the methods' own are in `methods/`.

Fields, defaults and names are those of peft's `adapter_config.json`, so files pass both ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from topwork import hub
from topwork.errors import ConfigError, nearest
from topwork.peft import methods

FILE = "adapter_config.json"
# In files, but without meaning for what an adapter computes.
INERT = frozenset({"megatron_config", "megatron_core", "peft_version", "runtime_config"})
# Options of the peer that are not acted on: accepted only at a value that switches them off.
OFF: tuple[Any, ...] = (None, False, [], {})


class TaskType(StrEnum):
    """What the adapted model is for; decides which heads are trained and saved with it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


PeftType = StrEnum("PeftType", [(name, name) for name in methods.NAMES])
"""The methods, by name."""

# Heads of a task that start untrained, and so are trained and saved with every adapter.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score", "pre_classifier"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass(kw_only=True)
class PeftConfig:
    """One adapter's settings. `PeftConfig.from_pretrained` gives the class of the file's method."""

    ALSO_INERT: ClassVar[frozenset[str]] = frozenset()
    """More keys of this method's files without meaning here."""
    PARTS: ClassVar[dict[str, type]] = {}
    """Fields that hold a configuration of their own; in files it is a dictionary."""
    WEIGHTS: ClassVar[str] = "adapter_model.safetensors"
    """The file of its tensors."""

    peft_type: str = ""
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    """Of the base model."""
    inference_mode: bool = False
    """Loaded adapters of this configuration are not trainable."""
    auto_mapping: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        own = _default(type(self), "peft_type")
        if self.peft_type != own:
            raise ConfigError(f"peft_type={self.peft_type!r} is not what {type(self).__name__} is")
        self.peft_type = PeftType[own] if own else own
        self.base_model_name_or_path = self.base_model_name_or_path or None
        one_of("task_type", self.task_type, (None, *TaskType))
        for name, kind in self.PARTS.items():
            setattr(self, name, _part(name, kind, getattr(self, name)))

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is virtual tokens rather than terms on layers."""
        return False

    @property
    def passes(self) -> int:
        """How often the model reads each text."""
        return 1

    @property
    def beyond_rows(self) -> str | None:
        """What it does that cannot be had text by text, if anything: the engine mixes texts and
        leaves it to `generate`."""
        return None

    @property
    def tasks(self) -> int | None:
        """How many tasks it knows, where each row names one."""
        return None

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: asdict(v) if is_dataclass(v) else v for k, v in values.items()}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From a file's keys. An option that is switched on and not acted on is refused."""
        if "peft_type" not in values and "config" in values:  # the `adapters` library's
            values = methods.method("BN").files.settings(values)
        kind = values.get("peft_type") or _default(cls, "peft_type")
        chosen = methods.config_class(kind)
        if not issubclass(chosen, cls):
            raise ConfigError(f"{FILE} is of peft_type {kind!r}, not a {cls.__name__}")
        known = {f.name for f in fields(chosen)}
        inert = INERT | chosen.ALSO_INERT
        unknown = {k: v for k, v in values.items() if k not in known | inert and v not in OFF}
        if unknown:
            raise ConfigError(
                f"{FILE} has options that {kind} does not act on here: "
                + ", ".join(f"{k}={v!r}{nearest(k, known)}" for k, v in unknown.items())
            )
        given = {k: v for k, v in values.items() if k in known}
        for f in fields(chosen):
            if given.get(f.name, 0) is None and f.default is not None:
                given.pop(f.name)
        return chosen(**given)

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors under the names of the method's files, from peft's."""
        return tensors

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is written of `to_file`'s tensors, where less than all; `from_file` reads it."""
        return tensors

    def from_file(self, tensors: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
        """A file's tensors under the names `wanted` that `to_file` gives, where they differ."""
        return tensors

    def save_pretrained(self, folder: str | Path, **changes: Any) -> None:
        """Write `adapter_config.json` into `folder`, with `changes`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        always = {f.name for f in fields(PeftConfig)} | {"target_modules", "modules_to_save"}
        values = {k: v for k, v in self.to_dict().items() if v is not None or k in always}
        values |= changes
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **where: Any) -> Self:
        """Read an adapter's configuration from a folder or a Hub id (`where`: revision, token…)."""
        checkpoint = hub.resolve(name_or_path, want=("adapter",), **where)
        return cls.from_dict(hub.read_json(checkpoint.folder / FILE))


@dataclass(kw_only=True)
class LayerConfig(PeftConfig):
    """Settings of a method that goes to layers: which ones."""

    target_modules: str | list[str] | None = None
    """Names (the last parts of a module's path), one regular expression for the whole path, or
    "all-linear": every linear except the output head. None: the usual ones of the family."""
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    """The name before the layer's number, when it is not the only number in the path."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no meaning without layers_to_transform")


def _part(name: str, kind: type, value: Any) -> Any:
    """The configuration `kind` in the field `name`, out of a dictionary where it is one."""
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    own = {f.name: f.init for f in fields(kind)}
    for key in value:
        if key not in own:
            raise ConfigError(f"{name} has no option {key!r}{nearest(key, own)}")
    return kind(**{key: given for key, given in value.items() if own[key]})


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a `value` that is not among `choices`."""
    if value not in choices:
        close = nearest(str(value), [c for c in choices if isinstance(c, str)])
        shown = ", ".join("None" if c is None else repr(getattr(c, "value", c)) for c in choices)
        raise ConfigError(f"{name}={value!r} is not known{close}; one of {shown}")


def at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")


def a_share(name: str, value: float) -> None:
    """Refuse a dropout rate outside [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} must be in [0, 1)")


def _default(cls: type[PeftConfig], name: str) -> Any:
    found = next(f for f in fields(cls) if f.name == name).default
    return "" if found is MISSING else found
