"""The base model's own tensors, under the names that they have without adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from topwork.errors import CheckpointError
from topwork.peft.inject import banks_of
from topwork.peft.store import LoadResult
from topwork.peft.targets import is_wrapper


def own_names(model: nn.Module) -> dict[str, str]:
    """The name of each of the base's tensors without adapters → its name in `model`."""
    banks = {key for key, _ in banks_of(model)}
    found = {}
    for name in model.state_dict():
        parts: list[str] = []
        at: Any = model
        for part in name.split("."):
            below = getattr(at, part)
            if is_wrapper(at) and below is not at.wrapped_module:
                break
            if not is_wrapper(at):
                parts.append(part)
            at = below
        else:
            if parts[0] not in banks:
                found[".".join(parts)] = name
    return found


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The tensors of the base model under its own names, without those of adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = base.state_dict()
    return {own: state[name] for own, name in own_names(base).items()}


def set_base_model_state_dict(
    model: Any, state_dict: dict[str, Tensor], strict: bool = True
) -> LoadResult:
    """Load tensors under the base model's own names below the adapters.

    Returns the names that are missing and those not known; `strict`: CheckpointError for any.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = own_names(base)
    missing = sorted(names.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - names.keys())
    if strict and (missing or unknown):
        raise CheckpointError(
            f"{type(base).__name__}: missing: {', '.join(missing[:20]) or 'none'}; "
            f"not known: {', '.join(unknown[:20]) or 'none'}"
        )
    given = {names[key]: tensor for key, tensor in state_dict.items() if key in names}
    base.load_state_dict(given, strict=False)
    return LoadResult(missing, unknown)
