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
    """`batches` (dataclasses of tensors, `Batch`es, and `metrics`) drawn in this round."""
    found: dict[str, Tensor] = {}
    facts = []
    for i, one in enumerate(batches):
        inner = {name: v for name, v in vars(one).items() if isinstance(v, Batch)}
        whole = {
            **vars(one),
            **{f"{n}.{k}": v for n, b in inner.items() for k, v in vars(b).items()},
            **{f"{n}.images.{k}": v for n, b in inner.items() for k, v in b.images.items()},
        }
        for name, value in whole.items():
            if isinstance(value, Tensor):
                found[f"{FACTS}.{i}.{name}"] = value.detach().clone()
        shapes = {name: {"lengths": b.lengths, "rows": b.rows} for name, b in inner.items()}
        facts.append({"inner": shapes, "metrics": one.metrics})
    text = json.dumps({"round": rounds, "batches": facts}).encode()
    return {FACTS: torch.frombuffer(bytearray(text), dtype=torch.uint8), **found}


def unpacked(found: dict[str, Tensor], kind: type) -> tuple[int, list[Any]]:
    """The round and its batches, of the dataclass `kind`, as they were."""
    facts = json.loads(bytes(found[FACTS].tolist()))
    batches = []
    for i, fact in enumerate(facts["batches"]):
        start = f"{FACTS}.{i}."
        own = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        inner = {name: _batch(name, shape, own) for name, shape in fact["inner"].items()}
        metrics = {name: (total, count) for name, (total, count) in fact["metrics"].items()}
        rest = {f.name: own[f.name] for f in fields(kind) if f.name in own}
        batches.append(kind(**inner, metrics=metrics, **rest))
    return facts["round"], batches


def _batch(name: str, shape: dict[str, Any], tensors: dict[str, Tensor]) -> Batch:
    start = f"{name}."
    own: dict[str, Any] = {
        k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)
    }
    lengths = tuple(tuple(n) if isinstance(n, list) else n for n in shape["lengths"])
    images = {k.removeprefix("images."): own.pop(k) for k in list(own) if k.startswith("images.")}
    return Batch(lengths=lengths, rows=tuple(shape["rows"]), images=images, **own)


def moved(one: Any, device: torch.device) -> Any:
    """`one` with its tensors on `device`."""
    held = {k: v.to(device) for k, v in vars(one).items() if isinstance(v, Tensor | Batch)}
    return replace(one, **held)
