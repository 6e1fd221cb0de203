"""What a call of `from_pretrained` asks for: how to load, where from, what to change."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch

from topwork import hub
from topwork.errors import ConfigError, nearest
from topwork.models.config import Config

# Without effect here, for the reasons in docs/moving.md.
IDLE = frozenset({
    "attn_implementation", "experts_implementation", "low_cpu_mem_usage", "offload_buffers",
    "offload_folder", "offload_state_dict", "trust_remote_code", "use_kernels", "weights_only",
})  # fmt: skip
OWN = ("device_map", "dtype", "quantization_config", "ignore_mismatched_sizes", "num_labels")
# As old scripts call it → its name.
OLD = {"torch_dtype": "dtype", "use_auth_token": "token"}
# At these values they ask for nothing.
PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_safetensors": ((True, None), "a legacy .bin is read with allow_bin=True"),
    "output_loading_info": ((False,), "a tensor that is missing or strange is an error"),
    "tp_plan": ((None,), "start the script with torchrun"),
    "max_memory": ((None,), "a model stands on one device: device_map='auto'"),
    "from_tf": ((False,), "files are safetensors"),
    "from_flax": ((False,), "files are safetensors"),
    "state_dict": ((None,), "call model.load_state_dict after loading"),
}


def told_apart(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """How to load (`dtype`, `device`, `quantization_config`), where from (as `hub.resolve` has it),
    and new values for keys of the configuration.

    ConfigError for what asks for something that is not done here.
    """
    how: dict[str, Any] = {}
    where: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for old, value in given.items():
        name = OLD.get(old, old)
        if name in IDLE:
            continue
        if name in PLAIN:
            if all(value is not v for v in PLAIN[name][0]):
                raise ConfigError(f"{name}={value!r} has no meaning here: {PLAIN[name][1]}")
        elif name in ("load_in_8bit", "load_in_4bit"):
            if value:
                how["quantization_config"] = {name: True}
        elif name == "device_map":
            how["device"] = device_of(value)
        elif name in hub.PLACES:
            where[name] = value
        else:
            (how if name == "dtype" else changes)[name] = value
    return how, where, changes


def device_of(asked: Any) -> torch.device:
    """The one device that a `device_map` names; "auto" is a GPU where there is one."""
    if isinstance(asked, Mapping):
        places = {str(place) for place in asked.values()}
        if len(places) != 1:
            raise ConfigError(f"device_map={dict(asked)!r}: a model stands on one device")
        (asked,) = asked.values()
    if asked in (None, "cpu"):
        return torch.device("cpu")
    if asked in ("auto", "balanced", "balanced_low_0", "sequential", "cuda"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with other values; whether the model acts on them its building tells.

    ConfigError for what is an option of `from_pretrained` but for a slip.
    """
    options = (*OWN, *IDLE, *OLD, *PLAIN, *hub.PLACES)
    for name in changes:
        meant = get_close_matches(name, options, n=1, cutoff=0.8)
        if meant and name not in {*config.to_dict(), *config.usual}:
            raise ConfigError(f"there is no option {name!r}{nearest(name, meant)}")
    return Config(**{**config.to_dict(), **changes})
