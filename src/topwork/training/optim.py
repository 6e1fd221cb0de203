"""The optimiser: parameter groups, and fp32 masters of parameters held in less."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import CheckpointError


class AdamW(torch.optim.AdamW):
    """torch's, without what it does only for torch's compiler: to import that takes 80 MB."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return unwrap(torch.optim.AdamW.step)(self, closure)


def _adamw(groups: Any, args: Any, fused: bool) -> torch.optim.Optimizer:
    betas = (args.adam_beta1, args.adam_beta2)
    return AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=fused)


OPTIMISERS: dict[str, Callable[[Any, Any], torch.optim.Optimizer]] = {
    "adamw_torch_fused": lambda groups, args: _adamw(groups, args, True),
    "adamw_torch": lambda groups, args: _adamw(groups, args, False),
    "sgd": lambda groups, args: torch.optim.SGD(groups, lr=args.learning_rate),
    "adagrad": lambda groups, args: torch.optim.Adagrad(groups, lr=args.learning_rate),
    "rmsprop": lambda groups, args: torch.optim.RMSprop(groups, lr=args.learning_rate),
    "adafactor": lambda groups, args: torch.optim.Adafactor(groups, lr=args.learning_rate),
}


class Optimiser:
    """A torch optimiser over the trainable parameters of a model.

    A parameter in less than fp32 gets an fp32 master: gradients of micro-batches are summed there,
    the step is taken there, and the result rounded back. Names are kept, so that its state is a
    plain mapping of named tensors.
    """

    def __init__(
        self, model: nn.Module, args: Any, given: torch.optim.Optimizer | None = None
    ) -> None:
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        if given is not None:
            self.inner = given
            return
        for name, parameter in self.named.items():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                self.masters[name] = parameter.detach().float().requires_grad_()
                parameter.register_post_accumulate_grad_hook(_into(self.masters[name]))
        plain = undecayed(model)
        decayed = [self._stepped(n) for n in self.named if n not in plain]
        rest = [self._stepped(n) for n in self.named if n in plain]
        groups = [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.inner = OPTIMISERS[args.optim]([g for g in groups if g["params"]], args)
        self.rates = [g["lr"] for g in self.inner.param_groups]

    def _stepped(self, name: str) -> Tensor:
        return self.masters.get(name, self.named[name])

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that the step changes."""
        return [self._stepped(name) for name in self.named]

    def set_factor(self, factor: float | None) -> float:
        """Scale each group's own rate (None: leave them); returns the first group's."""
        if factor is None:
            return self.inner.param_groups[0]["lr"]
        if not hasattr(self, "rates"):
            self.rates = [g["lr"] for g in self.inner.param_groups]
        for group, rate in zip(self.inner.param_groups, self.rates):
            group["lr"] = rate * factor
        return self.inner.param_groups[0]["lr"]

    @torch.no_grad()
    def step(self) -> None:
        """One step; the gradients stay."""
        self.inner.step()
        for name, master in self.masters.items():
            self.named[name].copy_(master)

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.named.values()):
            tensor.grad = None

    # -- state as named tensors ------------------------------------------------------------------

    def gradients(self) -> dict[str, Tensor]:
        """Those of a step that is not complete."""
        return {n: g for n in self.named if (g := self._stepped(n).grad) is not None}

    def set_gradients(self, given: dict[str, Tensor]) -> None:
        for name, grad in given.items():
            self._stepped(name).grad = grad.clone()

    def state(self) -> dict[str, Tensor]:
        """`name/key` → tensor, the masters included."""
        found = {f"{name}/master": m.detach() for name, m in self.masters.items()}
        for name in self.named:
            for key, value in self.inner.state.get(self._stepped(name), {}).items():
                found[f"{name}/{key}"] = torch.as_tensor(value)
        return found

    def load(self, given: dict[str, Tensor]) -> None:
        """Take up a saved state. CheckpointError when it is of other parameters."""
        names = {key.rpartition("/")[0] for key in given}
        if strange := sorted(names - set(self.named)):
            raise CheckpointError(f"the optimiser's state is of other parameters: {strange[:5]}")
        for key, value in given.items():
            name, _, part = key.rpartition("/")
            if part == "master":
                with torch.no_grad():
                    self.masters[name].copy_(value)
            else:
                self.inner.state[self._stepped(name)][part] = value.clone()


def _into(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None:
            master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    return add


def undecayed(model: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves alone: biases and everything of a norm."""
    norms = {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    biases = {n for n, _ in model.named_parameters() if n.rpartition(".")[2].endswith("bias")}
    return norms | biases


@torch.no_grad()
def clip(tensors: Iterable[Tensor], limit: float) -> float:
    """Scale the gradients so that their joint norm is at most `limit` (0: off); returns it."""
    tensors = [t for t in tensors if t.grad is not None]
    if not tensors:
        return 0.0
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(tensors, limit, norm)
    return float(norm)
