"""Several processes, one run: torch.distributed as it is, started by `torchrun`."""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return sums.tolist()

    @torch.no_grad()
    def gather(self, values: Tensor) -> tuple[Tensor, slice]:
        """`values` [n, ...] of all processes, one after the other, and where the own ones are."""
        if self.size == 1:
            return values, slice(0, len(values))
        sizes = self.total(*(len(values) if r == self.rank else 0 for r in range(self.size)))
        start = int(sum(sizes[: self.rank]))
        own = slice(start, start + len(values))
        whole = values.new_zeros(int(sum(sizes)), *values.shape[1:])
        whole[own] = values
        dist.all_reduce(whole)
        return whole, own

    @torch.no_grad()
    def add_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Sum every gradient over all processes; where one has none it counts as zero."""
        if self.size == 1:
            return
        for tensor in tensors:
            if not tensor.requires_grad:
                continue  # an adapter's method has left it out since
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            dist.all_reduce(tensor.grad)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def join() -> World:
    """Join the group that `torchrun` announces in the environment; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not dist.is_initialized():
        # Most optimizers import it; imported after the group is made, it keeps the group (and
        # so its threads) alive beyond `_leave`, and one that frees a tensor then aborts.
        importlib.import_module("torch._dynamo")
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    """Close the group, and join its threads, before Python ends: they may free tensors."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(named: str | None, use_cpu: bool) -> torch.device:
    """The device of a run: the one that is named, else a GPU where there is one."""
    if named is not None:
        return torch.device(named)
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
