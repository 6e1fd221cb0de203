"""What stands between the blocks of a trunk, for who asks with `output_hidden_states`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.models.packing import Padding


@contextmanager
def block_inputs(trunk: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Within it, the list fills with what each block of `trunk` is given, if it is `wanted`."""
    found: list[Tensor] = []
    spec = getattr(trunk, "spec", None)
    width = getattr(spec, "inner", getattr(spec, "hidden", None))

    def note(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Some adapters carry more than the hidden states from block to block, behind them.
        found.append(inputs[0][..., :width])

    blocks = dict.fromkeys(trunk.block_list) if wanted else ()  # some use one block several times
    hooks = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def hidden_states(
    found: list[Tensor], last: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Of rows as they were given, [B, T, C] each: what every block got, and the `last`, normed.

    Where the blocks saw packed rows they are unpacked; padding comes back as zeros.
    """
    if found and found[0].shape[:2] != last.shape[:2] and attention_mask is not None:
        rows = Padding.of(attention_mask)
        found = [rows.unpack(state) for state in found]
    return (*found, last)


def refuse_attentions(wanted: bool) -> None:
    """ConfigError when the weights of attention are asked for."""
    if wanted:
        raise ConfigError(
            "output_attentions=True: attention is computed in blocks and its weights are never "
            "formed as a whole; take queries and keys from a hook on q_proj and k_proj instead"
        )
