"""The files of the `adapters` library (AdapterHub): `adapter_config.json`, in which the adapter's
settings are one entry beside facts of its model, and `adapter.safetensors` (older ones:
`pytorch_adapter.bin`), in which a place's tensors stand under `….adapters.NAME.`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from topwork._version import __version__
from topwork.errors import ConfigError
from topwork.peft.config import LayerConfig

WEIGHTS = "adapter.safetensors"
CONFIG = "adapter_config.json"
# What acts only together with an option that is refused when it is on.
INERT = frozenset(
    {
        "architecture", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W",
        "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range",
        "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
    }
)  # fmt: skip
OFF = {"cross_adapter": False, "inv_adapter": None, "phm_layer": False, "use_gating": False}
# Facts beside the settings: ours ← the file's.
FACTS = {
    "base_model_name_or_path": "model_name",
    **{key: key for key in ("hidden_size", "model_class", "model_type", "name")},
    **{key: key for key in ("task_type", "modules_to_save")},  # which the library does not have
}
# Before files had a version these names meant others.
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
OLD_HOMES = re.compile(r"\b(?:attention|layer)_text_(?:task|lang)_adapters\.")
NAMED: dict[str, dict[str, Any]] = {
    "seq_bn": {"mh_adapter": False, "original_ln_before": True},
    "double_seq_bn": {"non_linearity": "swish"},
    "par_bn": {
        "mh_adapter": False, "reduction_factor": 2, "is_parallel": True, "scaling": 4.0,
        "init_weights": "mam_adapter",
    },
}  # fmt: skip
NAMED |= {old: NAMED[new] for old, new in (
    ("pfeiffer", "seq_bn"), ("houlsby", "double_seq_bn"), ("parallel", "par_bn"),
)}  # fmt: skip


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A file's keys as those of a `BnConfig`. Raises ConfigError for other kinds of adapters."""
    given = values["config"]
    if isinstance(given, str):
        if given not in NAMED:
            raise ConfigError(f"{CONFIG}: config={given!r} is not known; one of {', '.join(NAMED)}")
        given = NAMED[given]
    if not isinstance(given, dict):
        raise ConfigError(f"{CONFIG}: config is {given!r}, not an adapter's settings")
    if given.get("architecture"):
        raise ConfigError(
            f"{CONFIG}: architecture={given['architecture']!r} of the adapters library is not "
            "read; its bottleneck adapters are"
        )
    made = dict(given)
    old = made.pop("invertible_adapter", None)
    if old and values.get("type") != "text_task":  # there it stands for nothing
        made["inv_adapter"] = old
    if "version" not in values and "non_linearity" in made:
        name = made["non_linearity"]
        made["non_linearity"] = OLD_ACTIVATIONS.get(name, name)
    facts = {ours: values[key] for ours, key in FACTS.items() if values.get(key) is not None}
    return {**made, **facts, "peft_type": "BN"}


def write_config(config: Any, folder: str | Path) -> None:
    """Write the `adapter_config.json` of a `BnConfig` into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    inherited = {f.name for f in fields(LayerConfig)}
    own = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in inherited and f.name not in FACTS
    }
    if not isinstance(own["scaling"], str):
        own["scaling"] = float(own["scaling"])
    values = {
        "config": {**OFF, **own},
        "version": f"topwork.{__version__}",
        **{key: getattr(config, ours) for ours, key in FACTS.items()},
    }
    for key in ("model_class", "task_type", "modules_to_save"):
        if values[key] is None:
            del values[key]
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (Path(folder) / CONFIG).write_text(text, encoding="utf-8")


def disk_name(key: str, moves: Mapping[str, str]) -> str:
    """A tensor's name in the file; `moves`: the path of an adapted linear → its adapters'."""
    key = key.removeprefix("base_model.model.")
    for linear, home in moves.items():
        path, found, rest = key.partition(f".{linear}.adapters.")
        if found:
            return f"{path}.{home}.{rest}"
    return key


def renamed(tensors: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """A file's tensors under the names `wanted`, whichever head or trunk it was written from."""
    known = set(wanted)
    tails = {_tail(name): name for name in known}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        key = OLD_HOMES.sub("adapters.", key)
        found[key if key in known else tails.get(_tail(key), key)] = tensor
    return found


def _tail(name: str) -> str:
    """`name` from its block's number on."""
    match = re.search(r"\d+\..*\.adapters\..*", name)
    return match[0] if match else name
