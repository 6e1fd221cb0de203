"""How an adapter acts on one text among others, so that texts of all kinds share their passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.peft import inject, prompts, state
from topwork.peft.invocation import INVOKED, Invoked, invocations
from topwork.peft.parts import telling
from topwork.peft.scalings import SCALINGS, Scalings


@dataclass(frozen=True)
class Acting:
    """`adapter` (None: none) acts on layers from the token `start` of the text on; or it is `lead`
    virtual tokens before it, which count as the text's first. Before the token `own` the text's
    keys and values are the bare model's. `task`: of an adapter that knows several. `twice`: a first
    pass through the bare model goes before each (X-LoRA)."""

    adapter: str | None = None
    start: int = 0
    own: int = 0
    lead: int = 0
    task: int | None = None
    twice: bool = False

    @property
    def on_layers(self) -> str | None:
        return None if self.lead else self.adapter


def acting(model: Any, name: str | None, ids: Sequence[int], task: int | None = None) -> Acting:
    """How adapter `name` acts on the prompt `ids` and on what follows it; ConfigError for a `task`
    that the adapter lacks, or needs, and for what cannot be had text by text."""
    config = None if name is None else model.peft_config[name]
    tasks = None if config is None else config.tasks
    if tasks is None and task is not None:
        raise ConfigError(f"task_id={task}: the adapter {name!r} knows no tasks")
    if tasks is not None and (task is None or not 0 <= task < tasks):
        raise ConfigError(f"task_id={task}: the adapter {name!r} needs one of 0 to {tasks - 1}")
    if config is None:
        return Acting()
    if config.beyond_rows is not None:
        raise ConfigError(
            f"adapter {name!r} {config.beyond_rows}, which the engine's rows cannot do; use "
            "model.generate"
        )
    if config.is_prompt_learning:
        return Acting(name, lead=config.num_virtual_tokens, task=task)
    waiting = invocations({str(name): config})
    if waiting is None:
        return Acting(name, task=task, twice=config.passes == 2)
    start = int(waiting.starts(torch.tensor([list(ids)]))[str(name)])
    # Embeddings and modules of its own do not wait.
    at_once = config.modules_to_save or config.trainable_token_indices
    return Acting(name, start, 0 if at_once else start)


def apart(model: Any) -> frozenset[str | None]:
    """The adapters (None: none) that need passes of their own: they change what all rows of a pass
    go through, or there are modules that are trained whole."""
    names = getattr(model, "peft_config", None)
    if names is None:
        return frozenset()
    if any(True for _ in inject.saved_of(model)):
        return frozenset((None, *names))
    grafts = (item for layer in inject.layers_of(model) for item in layer.grafts.items())
    return frozenset(name for name, graft in grafts if not graft.BY_ROW)


def low_rank(model: Any) -> list[str] | None:
    """The adapters that are a low-rank term on every layer to which they go; None where `model`
    is no model with named adapters."""
    names = getattr(model, "peft_config", None)
    if names is None:
        return None
    fits: dict[str, bool] = {}
    for layer in inject.layers_of(model):
        for name, graft in layer.grafts.items():
            fits[name] = fits.get(name, True) and graft.token_term() is not None
    return [name for name in names if fits.get(name)]


def virtual_tokens(model: Any, row: Acting) -> Tensor | list[tuple[Tensor, Tensor]]:
    """The virtual tokens of `row`: [1, n, C], or a prefix's keys and values by layer."""
    prompt: Any = dict(model.prompt_encoder.items()).get(row.adapter)
    if prompt is None:
        raise ConfigError(f"there is no adapter {row.adapter!r} any more")
    if prompt.is_prefix:
        return [(k.to(model.dtype), v.to(model.dtype)) for k, v in prompts.keys_values(prompt, 1)]
    task = None if row.task is None else torch.tensor([row.task])
    return prompt(1, task).to(model.get_input_embeddings().weight.dtype)


@contextmanager
def within(
    model: Any,
    rows: Sequence[Acting],
    positions: Tensor,
    bare: Tensor | None = None,
    together: bool = True,
) -> Iterator[None]:
    """Within it each row of a batch with tokens at `positions` [B, T] goes through its adapter.

    `bare`: what the first pass gave [b, T, C] for those rows that need it. Not `together`: all rows
    have one adapter, which may change what they go through.
    """
    if not hasattr(model, "rows_by_adapter"):
        yield
        return
    first, names = rows[0].adapter, [row.on_layers for row in rows]
    with ExitStack() as stack:
        if together:
            chosen = model.rows_by_adapter([name or "__base__" for name in names])
        else:
            chosen = model.disable_adapter() if first is None else model.use_adapter(first)
        stack.enter_context(chosen)
        known = {name: model.peft_config[name] for name in names if name is not None}
        waiting = invocations(known)
        if waiting is not None:
            starts = torch.tensor([row.start for row in rows])[:, None]
            on = positions >= starts
            stack.enter_context(telling(INVOKED, Invoked(dict.fromkeys(waiting.tokens, on))))
        tasks = torch.tensor([row.task or 0 for row in rows])
        stack.enter_context(model.entry.telling(known, {"task_ids": tasks}))
        if bare is not None:
            made = getattr(model.base_model, state.ROUTER)(bare)
            values = made.new_zeros(len(rows), *made.shape[1:])
            values[[i for i, row in enumerate(rows) if row.twice]] = made
            stack.enter_context(telling(SCALINGS, Scalings(values)))
        yield
