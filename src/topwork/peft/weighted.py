"""One LoRA adapter made out of several: linear, by concatenation, by SVD; TIES (arXiv:2306.01708),
DARE (arXiv:2311.03099) and magnitude pruning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.peft.config import one_of
from topwork.peft.methods.ia3 import IA3Config
from topwork.peft.methods.lora import Lora, LoraConfig

MIXES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = (*MIXES, "cat", "svd", *(f"{mix}_svd" for mix in MIXES if mix != "linear"))


def mixed(
    tensors: list[Tensor], weights: list[float], kind: str, density: float | None, majority: str
) -> Tensor:
    """The weighted sum of `tensors` of one shape, after the pruning and voting that `kind` names.

    `density`: the share of entries that is kept. `majority`: whether the sign of each entry is
    voted by "total" (the sum) or by "frequency".
    """
    if kind != "linear":
        if density is None or not 0 <= density <= 1:
            raise ConfigError(f"combination_type={kind!r} needs a density in [0, 1], got {density}")
        prune = _random if kind.startswith("dare") else _largest
        tensors = [prune(tensor, density) for tensor in tensors]
    stacked = torch.stack(tensors)
    factors = torch.tensor(weights, device=stacked.device, dtype=stacked.dtype)
    scaled = stacked * factors.view(-1, *(1,) * (stacked.dim() - 1))
    if not kind.endswith("ties"):
        return scaled.sum(0)
    votes = stacked.sum(0) if majority == "total" else stacked.sign().sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with all but its largest entries at zero."""
    keep = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[keep] = 1
    return tensor * mask.view_as(tensor)


def _random(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with entries dropped at random and the others scaled up."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / max(density, 1e-12)


def combined_config(configs: list[Any], kind: str, svd_rank: int | None) -> Any:
    """The configuration of the new adapter; ConfigError for adapters that cannot be combined."""
    first = configs[0]
    if any(type(config) is not type(first) for config in configs):
        raise ConfigError("only adapters of one method can be combined")
    if not isinstance(first, (LoraConfig, IA3Config)):
        raise ConfigError(f"adapters of {first.peft_type} cannot be combined")
    config = replace(first, target_modules=_targets(configs), inference_mode=False)
    if isinstance(first, IA3Config):
        if kind not in ("linear", "svd"):  # the second one is the default of the verb
            raise ConfigError("IA3 adapters are combined by combination_type='linear'")
        return config
    one_of("combination_type", kind, KINDS)
    if any(config.use_dora or config.lora_bias for config in configs):
        raise ConfigError("adapters with use_dora or lora_bias cannot be combined")
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if kind in MIXES and len(set(ranks)) > 1:
        raise ConfigError(f"combination_type={kind!r} needs adapters of one rank, got {ranks}")
    rank = {"cat": sum(ranks)}.get(kind, (svd_rank or max(ranks)) if "svd" in kind else ranks[0])
    fresh = {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
    return replace(config, r=rank, lora_alpha=rank, use_rslora=False, **fresh)


def _targets(configs: list[Any]) -> str | list[str]:
    given = [config.target_modules for config in configs]
    if all(isinstance(one, list) for one in given):
        return sorted({name for one in given for name in one})
    if len({str(one) for one in given}) == 1:
        return given[0]
    if all(isinstance(one, str) and one != "all-linear" for one in given):
        return "|".join(f"({one})" for one in given)
    raise ConfigError(f"target_modules {given} cannot be joined; give all as names, or all as one")


def fill(
    grafts: dict[str, Any], name: str, sources: list[tuple[str, float]], how: tuple[Any, ...]
) -> None:
    """Set adapter `name` of one layer from those of its `grafts` that `sources` weighs; `how`: the
    kind, density, majority and clamp of `fill_lora`."""
    target = grafts.get(name)
    found = [(grafts[source], weight) for source, weight in sources if source in grafts]
    if isinstance(target, Lora):
        fill_lora(target, found, *how)
    elif target is not None:
        fill_ia3(target, found)


@torch.no_grad()
def fill_lora(
    target: Lora,
    sources: list[tuple[Lora, float]],
    kind: str,
    density: float | None,
    majority: str,
    clamp: float | None,
) -> None:
    """Set the matrices of `target` from those of `sources`, each with its weight."""
    a, b = target.matrices()
    a.zero_()
    b.zero_()
    if not sources:
        return
    if kind == "cat":
        made_a = torch.cat([s.matrices()[0] * (w * s.scale) for s, w in sources])
        made_b = torch.cat([s.matrices()[1] for s, _ in sources], 1)
        a[: len(made_a)], b[:, : made_b.shape[1]] = made_a, made_b
    elif kind.endswith("svd"):
        how = kind.removesuffix("_svd") if kind != "svd" else "linear"
        deltas = [source.delta() for source, _ in sources]
        whole = mixed(deltas, [w for _, w in sources], how, density, majority).flatten(1)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        rank = min(len(a), len(s))
        left, right = u[:, :rank] * s[:rank], vh[:rank]
        if clamp is not None:
            most = torch.quantile(torch.cat([left.flatten(), right.flatten()]), clamp)
            left, right = left.clamp(-most, most), right.clamp(-most, most)
        a[:rank] = right.view(rank, *a.shape[1:])
        b[:, :rank] = left.view(len(left), rank, *b.shape[2:])
    else:
        scaled = [w * s.scale for s, w in sources]
        root = [math.sqrt(abs(w)) for w in scaled]
        signed = [math.copysign(r, w) for r, w in zip(root, scaled)]
        pairs = [s.matrices() for s, _ in sources]
        a.copy_(mixed([p[0].detach() for p in pairs], signed, kind, density, majority))
        b.copy_(mixed([p[1].detach() for p in pairs], root, kind, density, majority))


@torch.no_grad()
def fill_ia3(target: Any, sources: list[tuple[Any, float]]) -> None:
    """The weighted sum of the factors."""
    if sources:
        target.parameter("ia3_l").copy_(sum(source["ia3_l"] * weight for source, weight in sources))
