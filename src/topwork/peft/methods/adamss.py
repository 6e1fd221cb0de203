"""AdaMSS (adaptive multi-subspaces): the weight's outputs are grouped by where they lie in its
leading singular directions, and each group gets a low-rank change of its own within those."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import usual
from topwork.peft.config import LayerConfig, at_least, one_of
from topwork.peft.graft import Graft

Array = npt.NDArray[Any]
SEED = 123456789
"""Of the groups' first centres, as in peft."""


@dataclass(kw_only=True)
class AdamssConfig(LayerConfig):
    """Outputs of group k: + B_k A_k V x, V [r, in] being the weight's leading directions. A bias
    counts as one more column of the weight, and changes with it."""

    r: int = 100
    """Directions; at most as many as the weight has."""
    num_subspaces: int = 5
    """Groups of outputs."""
    subspace_rank: int = 1
    """The rank of each group's change."""
    init_weights: str | bool | None = "orthogonal"
    """The B start at zero; None: at random."""
    use_asa: bool = False
    """Train in the end only the most important groups of all layers, which
    `model.update_and_allocate(step)` chooses in each step."""
    asa_target_subspaces: int = 50
    """How many groups are trained at last."""
    init_warmup: int = 50
    """The step from which groups are left out."""
    final_warmup: int = 1000
    """The step by which only `asa_target_subspaces` are left."""
    mask_interval: int = 100
    """Steps between two choices."""
    asa_importance_beta: float = 0.85
    """Smoothing of the importance."""
    asa_uncertainty_beta: float = 0.85
    """Smoothing of its uncertainty."""
    asa_schedule_exponent: float = 3.0
    """How fast groups are left out; 1: evenly."""
    use_dynamic_rank: bool = False
    """Lower a group's rank to the number of its squared singular values that count."""
    svd_threshold: float = 0.1
    """Those above this share of the largest one count."""
    random_seed: int = 0
    """Of the search for the directions."""
    peft_type: str = "ADAMSS"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_subspaces", "subspace_rank"):
            at_least(name, getattr(self, name), 1)
        self.init_weights = self.init_weights or None
        one_of("init_weights", self.init_weights, ("orthogonal", None))
        if not self.use_asa:
            return
        at_least("mask_interval", self.mask_interval, 1)
        at_least("asa_target_subspaces", self.asa_target_subspaces, 1)
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"init_warmup={self.init_warmup} must be smaller than "
                f"final_warmup={self.final_warmup}"
            )
        if self.asa_schedule_exponent <= 0:
            raise ConfigError(
                f"asa_schedule_exponent={self.asa_schedule_exponent} must be positive"
            )


class Adamss(Graft):
    USUAL = usual.LINEARS | {"vit": ["query", "value"]}
    config: AdamssConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.places: list[Tensor] = []
        """The outputs of each group."""
        self.importance: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def create(self) -> dict[str, Tensor | nn.Module]:
        config = self.config
        left, v = directions(self._whole(), config.r, config.random_seed)
        self.places = groups(left, config.num_subspaces)
        a, b = [], []
        for places in self.places:
            matrix = self._start(left[places])
            a.append(nn.Parameter(matrix))
            b.append(nn.Parameter(self.empty(len(places), len(matrix)).zero_()))
            if config.init_weights is None:
                b[-1].normal_(std=0.01)
        return {
            "adamss_A": nn.ParameterList(a),
            "adamss_B": nn.ParameterList(b),
            "adamss_newB": v,  # fp32 whatever the base: `meets` wants it exact
        }

    def _whole(self) -> Tensor:
        """The weight with the bias as its last column, fp32."""
        weight, bias = self.weight, self.base.bias
        return weight if bias is None else torch.cat([weight, bias.detach().float()[:, None]], 1)

    def _start(self, left: Tensor) -> Tensor:
        """A [rank, r] of a group with these rows of U [n, r]: their own leading directions."""
        _, sizes, own = torch.linalg.svd(left, full_matrices=False)
        rank = min(self.config.subspace_rank, len(sizes))
        if self.config.use_dynamic_rank:
            squares = sizes.square()
            rank = min(rank, max(1, int((squares > self.config.svd_threshold * squares[0]).sum())))
        return own[:rank].contiguous()

    def meets(self, given: dict[str, Tensor]) -> None:
        """Where a file has other directions than were found here (as on another kind of device),
        group the outputs by those."""
        v = given.get("adamss_newB")
        if v is None or v.shape != self["adamss_newB"].shape:
            return
        v = v.to(self["adamss_newB"])
        if torch.allclose(v, self["adamss_newB"], rtol=1e-2, atol=1e-3):
            return
        self.places = groups(left_of(self._whole(), v), len(self.places))
        told = [len(t) for n, t in sorted(given.items(), key=_number) if "adamss_B" in n]
        if told != [len(places) for places in self.places]:
            raise CheckpointError(
                f"{self.path}: the file's groups have {told} outputs, and those found in this base "
                f"{[len(places) for places in self.places]}: it was made on another base or device"
            )
        for places, b in zip(self.places, self._lists()[1]):
            b.data = b.new_empty(len(places), b.shape[1])

    # -- computing -------------------------------------------------------------------------------

    def _lists(self) -> tuple[Any, Any]:
        return self.layer.adamss_A[self.name], self.layer.adamss_B[self.name]

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A [k, in (+ 1)] and B [out, k] of all groups together."""
        first, second = self._lists()
        a = torch.cat(list(first)) @ self["adamss_newB"].to(first[0].dtype)
        blocks = torch.block_diag(*second)
        order = torch.cat(self.places).to(blocks.device)
        return a, torch.zeros_like(blocks).index_copy(0, order, blocks)

    def term(self) -> ops.LoraTerm | None:
        return None if self.base.bias is not None else ops.LoraTerm(*self._matrices(), 1.0)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (m.to(y.dtype) for m in self._matrices())
        constant = None if self.base.bias is None else a[:, -1]
        return y + F.linear(F.linear(x, a[:, : self.site.inputs], constant), b)

    def delta(self) -> Tensor:
        a, b = self._matrices()
        return b @ a[:, : self.site.inputs]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self._matrices()
        changed = None if bias is None else bias + b @ a[:, -1]
        return weight + b @ a[:, : self.site.inputs], changed

    # -- the allocation --------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def update_and_allocate(cls, config: AdamssConfig, grafts: list[Adamss], step: int) -> None:
        """With the gradients of `step`: measure each group's importance, and at every
        `mask_interval` go on with the most important ones alone."""
        if not config.use_asa or not config.init_warmup <= step <= config.final_warmup:
            return
        for graft in grafts:
            graft._measure()
        if step % config.mask_interval == 0:
            choose(grafts, budget(config, sum(len(graft.places) for graft in grafts), step))

    def _measure(self) -> None:
        """Update importance |w · ∂L/∂w| and its uncertainty, both smoothed."""
        b1, b2 = self.config.asa_importance_beta, self.config.asa_uncertainty_beta
        for name, weights in zip("AB", self._lists()):
            for k, weight in enumerate(weights):
                if weight.grad is None:
                    continue
                now = (weight * weight.grad).abs()
                zero = torch.zeros_like(now)
                mean, spread = self.importance.get((name, k), (zero, zero))
                spread = b2 * spread + (1 - b2) * (now - mean).abs()
                self.importance[name, k] = (b1 * mean + (1 - b1) * now, spread)

    def scores(self) -> Iterable[tuple[int, float]]:
        """The importance of each group that was trained since the last choice."""
        for k in range(len(self.places)):
            if ("A", k) in self.importance and ("B", k) in self.importance:
                parts = (self.importance[name, k] for name in "AB")
                yield k, sum(float((mean * spread).mean()) for mean, spread in parts)


def budget(config: AdamssConfig, total: int, step: int) -> int:
    """How many groups are trained after `step`, of `total` at first."""
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    target = config.asa_target_subspaces
    return int(target + (total - target) * left**config.asa_schedule_exponent)


def choose(grafts: list[Adamss], keep: int) -> None:
    """Train on with the `keep` most important groups alone, and measure from the beginning.

    peft keeps one fewer, because it wants more than the importance of the last one that counts.
    """
    found = [(score, graft, k) for graft in grafts for k, score in graft.scores()]
    found.sort(key=lambda entry: -entry[0])
    for at, (_, graft, k) in enumerate(found):
        for weights in graft._lists():
            weights[k].requires_grad_(at < keep)
            if at >= keep:
                weights[k].grad = None
    for graft in grafts:
        graft.importance.clear()


# -- the groups ----------------------------------------------------------------------------------


def directions(weight: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """U [out, r] and V [r, in] of the leading singular directions, by a random search."""
    devices = [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices, device_type=weight.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        u, _, v = torch.svd_lowrank(weight, q=min(r, *weight.shape), niter=2)
    return u, v.t().contiguous()


def left_of(weight: Tensor, v: Tensor) -> Tensor:
    """The U that `directions` found together with V [r, in]: of a wide weight W V, of a tall one
    what Wᵀ takes to V, each column made one long again."""
    whole, right = weight.double().cpu(), v.double().cpu().t()
    wide = len(whole) < whole.shape[1]
    found = whole @ right if wide else torch.linalg.lstsq(whole.t(), right, driver="gelsd").solution
    return F.normalize(found, dim=0).to(weight)


def groups(rows: Tensor, count: int) -> list[Tensor]:
    """Which of the `rows` [n, r] lie together: for each of at most `count` groups their indices.

    Lloyd's k-means from random rows, at most ten rounds: the groups that scikit-learn's
    KMeans(init="random", n_init=1, max_iter=10, random_state=SEED) finds. Its order of rounding is
    kept too, because the rows of a square U are all equally far from each other.
    """
    points = rows.detach().float().cpu().contiguous().numpy()
    enough = 1e-4 * points.var(0).mean()
    points = points - points.mean(0)
    share = np.ones(len(points), np.float32) / np.float32(len(points))
    draw = np.random.RandomState(SEED)
    centres = points[draw.choice(len(points), min(count, len(points)), replace=False, p=share)]
    labels = None
    for _ in range(10):
        before, labels = labels, nearest_of(points, centres)
        moved = means(points, labels, centres)
        centres, far = moved, np.square(moved - centres).sum()
        if before is not None and np.array_equal(before, labels):
            break
        if far <= enough:
            labels = nearest_of(points, centres)
            break
    else:
        labels = nearest_of(points, centres)
    found = [np.flatnonzero(labels == k) for k in range(len(centres))]
    return [torch.from_numpy(places).to(rows.device) for places in found if len(places)]


def nearest_of(points: Array, centres: Array) -> Array:
    """The nearest centre of each point."""
    sizes = np.einsum("ij,ij->i", centres, centres)
    return (sizes - 2 * (points @ centres.T)).argmin(1)


def means(points: Array, labels: Array, centres: Array) -> Array:
    """The mean of each group; an empty one gets the point farthest from its own centre."""
    counts = np.bincount(labels, minlength=len(centres)).astype(np.float32)
    sums = np.zeros_like(centres)
    np.add.at(sums, labels, points)
    empty = np.flatnonzero(counts == 0)
    far = np.square(points - centres[labels]).sum(1)
    if len(empty) and far.max() > 0:
        for group, point in zip(empty, far.argsort()[::-1]):
            sums[labels[point]] -= points[point]
            counts[labels[point]] -= 1
            sums[group], counts[group] = points[point], 1
    found = sums * (1 / np.maximum(counts, 1))[:, None]
    return np.where(counts[:, None] > 0, found, found[counts.argmax()])


def _number(item: tuple[str, Tensor]) -> tuple[int, str]:
    tail = item[0].rpartition(".")[2]
    return (int(tail) if tail.isdigit() else -1, item[0])


CONFIG = AdamssConfig
GRAFT = Adamss
