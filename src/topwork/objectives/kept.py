"""Drawn micro-batches as named tensors and back, so that a checkpoint between two steps on the same
answers holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from topwork.data.packing import Batch

FACTS = "kept"


def packed(rounds: int, batches: Sequence[Any]) -> dict[str, Tensor]:
    """`batches` (dataclasses of tensors, a `Batch`, and `metrics`) drawn in this round."""
    found: dict[str, Tensor] = {}
    facts = []
    for i, one in enumerate(batches):
        whole = {**vars(one), **{f"batch.{k}": v for k, v in vars(one.batch).items()}}
        for name, value in whole.items():
            if isinstance(value, Tensor):
                found[f"{FACTS}.{i}.{name}"] = value.detach().clone()
        facts.append({"lengths": one.batch.lengths, "rows": one.batch.rows, "metrics": one.metrics})
    text = json.dumps({"round": rounds, "batches": facts}).encode()
    return {FACTS: torch.frombuffer(bytearray(text), dtype=torch.uint8), **found}


def unpacked(found: dict[str, Tensor], kind: type) -> tuple[int, list[Any]]:
    """The round and its batches, of the dataclass `kind`, as they were."""
    facts = json.loads(bytes(found[FACTS].tolist()))
    batches = []
    for i, fact in enumerate(facts["batches"]):
        start = f"{FACTS}.{i}."
        own = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        lengths = tuple(tuple(n) if isinstance(n, list) else n for n in fact["lengths"])
        inner: dict[str, Any] = {
            k.removeprefix("batch."): v for k, v in own.items() if k.startswith("batch.")
        }
        batch = Batch(lengths=lengths, rows=tuple(fact["rows"]), **inner)
        metrics = {name: (total, count) for name, (total, count) in fact["metrics"].items()}
        rest = {f.name: own[f.name] for f in fields(kind) if f.name in own}
        batches.append(kind(batch=batch, metrics=metrics, **rest))
    return facts["round"], batches


def moved(one: Any, device: torch.device) -> Any:
    """`one` with its tensors on `device`."""
    tensors = {k: v.to(device) for k, v in vars(one).items() if isinstance(v, Tensor)}
    return replace(one, batch=one.batch.to(device), **tensors)
