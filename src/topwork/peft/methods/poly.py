"""Poly (arXiv:2202.13914, multi-head arXiv:2211.03831): LoRA mixed for each task from an inventory
of skills."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.ops.recompute import Carried
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft
from topwork.peft.parts import telling, told


@dataclass(kw_only=True)
class PolyConfig(LayerConfig):
    """B_t A_t / r, each a mixture of `n_skills` by the logits of the row's task, which `task_ids`
    [B] names; with `n_splits` parts of the inputs and outputs mixed apart."""

    r: int = 8
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    init_weights: bool = True
    """B starts at zero; False: at random."""
    peft_type: str = "POLY"

    @property
    def tasks(self) -> int | None:
        return self.n_tasks

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            at_least(name, getattr(self, name), 1)
        one_of("poly_type", self.poly_type, ("poly",))


class Logits(nn.Module):
    """The logits [tasks, splits x skills] under their name in files."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.module_logits = nn.Parameter(logits)


@dataclass(frozen=True)
class Tasks:
    """The task of each row [B], and how many real tokens a row has."""

    ids: Tensor
    counts: tuple[int, ...] | None = None

    def part(self, shape: torch.Size, dim: int, index: Tensor) -> Tasks:
        index = index.to(self.ids.device)
        if dim == 0:
            return Tasks(self.ids.repeat_interleave(shape[0] // len(self.ids))[index])
        counts = torch.tensor(self.counts, device=index.device)
        row = torch.arange(len(self.ids), device=index.device).repeat_interleave(counts)
        rows, counts = row[index].unique_consecutive(return_counts=True)
        return Tasks(self.ids[rows], tuple(counts.tolist()))


TASKS: Carried[Tasks] = told(Carried("topwork.tasks"))


class Poly(Graft):
    config: PolyConfig

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, site, n = self.config, self.site, self.config.n_splits
        if site.inputs % n or site.outputs % n:
            raise ConfigError(f"n_splits={n} does not divide the sides of {self.path}")
        a = self.empty(n, config.n_skills, site.inputs // n, config.r)
        b = self.empty(n, config.n_skills, config.r, site.outputs // n)
        a.uniform_(-1, 1).mul_(1 / math.sqrt(site.inputs // n))
        b.uniform_(-1, 1).mul_(0 if config.init_weights else 1 / math.sqrt(config.r))
        logits = self.empty(config.n_tasks, n * config.n_skills).uniform_(-1e-3, 1e-3)
        return {
            "poly_lora_A": nn.Parameter(a), "poly_lora_B": nn.Parameter(b),
            "poly_router": Logits(logits),
        }  # fmt: skip

    @classmethod
    @contextmanager
    def during(cls, config: Any, call: dict[str, Any]) -> Iterator[None]:
        """`task_ids` [B] out of the call."""
        tasks, keep = call.pop("task_ids", None), call.get("attention_mask")
        if tasks is None:
            yield
            return
        if not torch.compiler.is_compiling() and int(tasks.max()) >= config.n_tasks:
            raise ConfigError(f"task_ids goes up to {int(tasks.max())}, of {config.n_tasks} tasks")
        counts = call.get("lengths")
        if keep is not None and keep.dim() == 2:
            counts = tuple(keep.sum(1).tolist())
        with telling(TASKS, Tasks(tasks, counts)):
            yield

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        known = TASKS.get()
        if known is None:
            raise ConfigError("POLY needs task_ids, one for each row")
        tasks, counts = known.ids, known.counts
        if x.shape[0] % len(tasks) == 0 and (len(tasks) > 1 or counts is None or len(counts) == 1):
            wide = tasks.repeat_interleave(x.shape[0] // len(tasks))
            rows = x
        elif counts is not None and x.shape[0] == 1 and x.shape[1] == sum(counts):
            rows, wide = (
                nn.utils.rnn.pad_sequence(list(x[0].split(counts)), batch_first=True),
                tasks,
            )
        else:
            raise ConfigError(f"{len(tasks)} task_ids, but a layer got {x.shape[0]} rows")
        a, b = (m.to(y.dtype) for m in self._mixed(wide.to(x.device)))
        flat = rows if rows.dim() == 3 else rows[:, None]
        added = (flat @ a @ b / self.config.r).view(*rows.shape[:-1], -1)
        if rows is not x:
            added = torch.cat([row[:n] for row, n in zip(added, counts or ())])[None]
        return y + added

    def _mixed(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """A [B, in, r] and B [B, r, out] of the rows' tasks."""
        config = self.config
        logits = self.layer.poly_router[self.name].module_logits[tasks].float()
        logits = logits.view(-1, config.n_splits, config.n_skills)
        if self.layer.training:
            least = torch.finfo(logits.dtype).eps  # a relaxed Bernoulli's draw at temperature 1
            chance = torch.rand_like(logits).clamp(least, 1 - least)
            logits = logits + chance.log() - (-chance).log1p()
        weights = logits.sigmoid()
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        a = torch.einsum("bqs,qsdr->bqdr", weights, self["poly_lora_A"]).flatten(1, 2)
        b = torch.einsum("bqs,qsrd->brqd", weights, self["poly_lora_B"]).flatten(2)
        return a, b

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(f"{self.path}: POLY differs by task and cannot be merged into a weight")


CONFIG = PolyConfig
GRAFT = Poly
