"""`LoraConfig`, with the fields and the file of peft's `adapter_config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from topwork.errors import CheckpointError, ConfigError, nearest

FILE = "adapter_config.json"
# In the file, but without meaning for what the adapter computes.
INERT = frozenset(
    {
        "auto_mapping",
        "inference_mode",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
# Options of peft that are not acted on yet: only at the value that switches them off.
OFF: tuple[Any, ...] = (None, False, [], {})
BIASES = ("none", "all", "lora_only")


@dataclass(kw_only=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685): W x + alpha/r · B A x on the chosen modules."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    """Names (the last parts of a module's path), one regular expression for the whole path, or
    "all-linear": every linear except the output head. None: the usual ones of the family."""
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    """The name before the layer's number, when it is not the only number in the path."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    """Scale by alpha/√r (arXiv:2312.03732)."""
    init_lora_weights: bool | str = True
    """True: A uniform (Kaiming), B zero; "gaussian": A normal with 1/r; False: both random."""
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    peft_type: str = "LORA"

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        if self.r < 1:
            raise ConfigError(f"r={self.r} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
        if self.bias not in BIASES:
            raise ConfigError(f"bias={self.bias!r}{nearest(self.bias, BIASES)}; one of {BIASES}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported; "
                "True, False or 'gaussian'"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no meaning without layers_to_transform")

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        """From a file's keys. An option that is switched on and not acted on is refused."""
        if values.get("peft_type", "LORA") != "LORA":
            raise ConfigError(f"peft_type={values['peft_type']!r} is not supported; only LORA")
        known = {f.name for f in fields(cls)}
        unknown = {k: v for k, v in values.items() if k not in known | INERT and v not in OFF}
        if unknown:
            raise ConfigError(
                f"{FILE} has options that are not supported: "
                + ", ".join(f"{k}={v!r}{nearest(k, known)}" for k, v in unknown.items())
            )
        chosen = {k: v for k, v in values.items() if k in known}
        for pattern in ("rank_pattern", "alpha_pattern"):
            chosen[pattern] = chosen.get(pattern) or {}
        return cls(**chosen)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` into `folder`."""
        values = {**self.to_dict(), "inference_mode": True}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoraConfig:
        path = Path(folder) / FILE
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from error
