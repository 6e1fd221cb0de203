"""Optimisers for LoRA: LoRA+ (arXiv:2402.12354), LoRA-FA (arXiv:2308.03303) and Riemannian
preconditioning (arXiv:2402.02347)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from topwork.errors import ConfigError
from topwork.peft import inject
from topwork.peft.methods.lora import Lora


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """LoRA+: B learns `loraplus_lr_ratio` times as fast as A, embeddings at their own rate, vectors
    as fast as B; biases have no weight decay. The groups: A, embeddings, B, biases."""
    groups: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "bias": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding" in name:
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.dim() == 1:
            groups["bias" if "bias" in name else "b"].append(parameter)
        else:
            groups["a"].append(parameter)
    decay, fast = loraplus_weight_decay, lr * loraplus_lr_ratio
    rates = {
        "a": (lr, decay),
        "embedding": (loraplus_lr_embedding, decay),
        "b": (fast, decay),
        "bias": (fast, 0.0),
    }
    made = [
        {"params": groups[key], "lr": rate, "weight_decay": decayed}
        for key, (rate, decayed) in rates.items()
    ]
    return optimizer_cls(made, lr=lr, **kwargs)  # type: ignore[call-arg]


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA: A stays as it started, and AdamW gets for B the gradient G (A Aᵀ)⁻¹ / s², the one
    nearest to that of the whole weight.

    The scale s is each layer's own, so `r`, `lora_alpha` and `use_rslora` need not be said.
    """
    loras = [graft for graft in _loras(model) if graft.parameter("lora_B").requires_grad]
    if not loras:
        raise ConfigError(f"{type(model).__name__} trains no LoRA matrix")
    for graft in loras:
        graft.parameter("lora_A").requires_grad_(False)

    def project(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for graft in loras:
            a, b = (graft.parameter(name) for name in ("lora_A", "lora_B"))
            if b.grad is not None:
                inverse = _inverse(a.detach().float().flatten(1), 1e-8)
                _apply(b.grad, lambda g, m=inverse: g @ m, 1 / graft.scale**2)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=lr, eps=1e-6, weight_decay=weight_decay)
    optimizer.register_step_pre_hook(_without_closure(project))
    return optimizer


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-2,
    **kwargs: Any,
) -> Optimizer:
    """`optimizer_cls` with the gradients (Bᵀ B + reg I)⁻¹ G of A and G (A Aᵀ + reg I)⁻¹ of B, in
    which the size of neither matrix counts. What is not a pair of linear's matrices is trained
    plainly."""
    pairs = [
        (graft.parameter("lora_A"), graft.parameter("lora_B"))
        for graft in _loras(model)
        if graft.site.kind == "linear"
    ]
    pairs = [(a, b) for a, b in pairs if a.requires_grad and b.requires_grad]
    if not pairs:
        raise ConfigError(f"{type(model).__name__} trains no pair of LoRA matrices of a linear")

    def precondition(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for a, b in pairs:
            right, left = _inverse(a.detach().float(), reg), _inverse(b.detach().float().t(), reg)
            if a.grad is not None:
                _apply(a.grad, lambda g, m=left: m @ g)
            if b.grad is not None:
                _apply(b.grad, lambda g, m=right: g @ m)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = optimizer_cls(trained, lr=lr, **kwargs)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(_without_closure(precondition))
    return optimizer


def _loras(model: nn.Module) -> list[Lora]:
    """The LoRA grafts with matrices A and B of their own."""
    grafts = [g for layer in inject.layers_of(model) for g in layer.grafts.values()]
    return [g for g in grafts if isinstance(g, Lora) and g.owner is None and g.has("lora_B")]


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    """(M Mᵀ + damping · I)⁻¹ [r, r] of M [r, n]."""
    eye = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    return torch.linalg.pinv(matrix @ matrix.t() + damping * eye, hermitian=True)


def _apply(grad: Tensor, change: Any, scale: float = 1.0) -> None:
    """Put a changed gradient in place; the change sees it as a matrix in fp32."""
    grad.copy_((change(grad.float().flatten(1)) * scale).view_as(grad))


def _without_closure(change: Any) -> Any:
    """`change` as a hook before a step; a closure would compute the gradients again after it."""

    @torch.no_grad()
    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise ConfigError("a step with a closure computes its gradients anew, unchanged")
        change(optimizer, args, kwargs)

    return hook
