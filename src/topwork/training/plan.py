"""What a run will need, before its first step: parameters, memory, and the batch that fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork.quant import Summary
from topwork.training.objective import Objective

# Beside tensors: the interpreter, torch's libraries, buffers of its kernels (measured: 0.5 GB).
RUNTIME = 500 * 2**20


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, for the largest micro-batch of the run."""

    weights: int
    trainable: int
    parameters: int
    optimiser: int
    activations_per_token: float
    largest_batch: int
    available: int | None
    quantised: str = ""

    @property
    def activations(self) -> int:
        return int(self.activations_per_token * self.largest_batch)

    @property
    def total(self) -> int:
        return self.weights + self.optimiser + self.activations + RUNTIME

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    @property
    def tokens_that_fit(self) -> int | None:
        """Tokens of a micro-batch that fill what is free."""
        if self.available is None or not self.activations_per_token:
            return None
        free = self.available - self.weights - self.optimiser - RUNTIME
        return max(0, int(free / self.activations_per_token))

    def lines(self) -> list[str]:
        share = 100 * self.trainable / max(1, self.parameters)
        text = [
            f"trainable {self.trainable:,} of {self.parameters:,} parameters ({share:.2f} %)",
            f"memory {size(self.total)}: weights {size(self.weights)}, optimiser and gradients "
            f"{size(self.optimiser)}, activations {size(self.activations)} "
            f"({self.largest_batch:,} tokens in the largest micro-batch)",
        ]
        if self.quantised:
            text.insert(1, f"base quantised: {self.quantised}")
        if self.available is not None and self.tokens_that_fit is not None:
            verdict = "fits" if self.fits else "DOES NOT FIT"
            text.append(
                f"{verdict} in {size(self.available)}, which hold micro-batches of about "
                f"{self.tokens_that_fit:,} tokens"
            )
        return text


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may use in all: those it has, and those that are free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    limit = _control_group_limit()
    used = resident_memory()
    return min(free + used, limit) if limit is not None else free + used


def _control_group_limit() -> int | None:
    """The memory limit of this process's container, if it has one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            value = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if value.isdigit() and int(value) < 2**60:
            return int(value)
    return None


def resident_memory() -> int:
    """Bytes of this process in memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that `run` keeps for its backward pass, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = run()
        total = sum(seen.values())
        del kept
    return total


def make_plan(
    model: nn.Module,
    optimiser_bytes: int,
    probe: Callable[[], tuple[Tensor, int]],
    largest_batch: int,
    device: torch.device,
) -> Plan:
    """The plan of a run. `probe` computes a small batch and returns its loss and its tokens.

    What the probe draws at random is drawn again by the run: the generators are put back.
    """
    parameters = list(model.parameters())
    weights = sum(t.nbytes for t in (*parameters, *model.buffers()))
    packed = Summary.of(model)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    before = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    tokens = 0

    def run() -> Tensor:
        nonlocal tokens
        loss, tokens = probe()
        return loss

    saved = saved_bytes(run, model)
    torch.set_rng_state(before)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
    return Plan(
        weights,
        trainable,
        sum(p.numel() for p in parameters) + packed.numbers,
        optimiser_bytes,
        saved / max(1, tokens),
        largest_batch,
        available_memory(device),
        str(packed) if packed.layers else "",
    )


def looked_at(data: Sequence[Any], most: int) -> list[int]:
    """At most `most` samples of `data`, evenly spaced; of a stream those that it knows already."""
    count = min(len(data), getattr(data, "known", len(data)))
    return [i * count // min(count, most) for i in range(min(count, most))]


def plan_of(
    model: nn.Module, objective: Objective, data: Sequence[Any], micro: int, optimiser_bytes: int,
    device: torch.device,
) -> Plan:  # fmt: skip
    """The plan of a run over `data` in micro-batches of `micro` samples.

    Of what is no list in memory some 500 samples are looked at.
    """
    count = len(data) if isinstance(data, (list, tuple)) else 500
    sizes = sorted((objective.size(data[i]), i) for i in looked_at(data, count))
    largest = sum(n for n, _ in sizes[-micro:])
    middle = sizes[len(sizes) // 2][1]
    sketch = getattr(objective, "sketch", None)

    def probe() -> tuple[Tensor, int]:
        if sketch is not None:
            batch = sketch(model, data[middle])
        else:
            (batch,) = objective.assemble(model, [[data[middle]]])
        return objective.loss(model, batch).total, objective.tokens(batch)

    return make_plan(model, optimiser_bytes, probe, largest, device)


def main_dtype(model: nn.Module) -> str:
    """The dtype that most parameters have."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name])
