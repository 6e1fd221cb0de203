"""The trained model merged with another one when a run ends, or at each checkpoint: on a line or an
arc between both, or by what each changed of the model they come from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.models import AutoConfig, AutoModelForCausalLM
from topwork.objectives.setup import at_least, one_of
from topwork.peft import PeftModel
from topwork.peft.weighted import mixed
from topwork.training import TrainerCallback
from topwork.training.files import save_model

CHANGES = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
METHODS = ("linear", "slerp", *CHANGES)
FOLDER = "merged"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


@dataclass
class MergeConfig:
    """How two models become one.

    "linear": their weighted mean; "slerp": on the arc between them. The others add what each
    changed, pruned to its largest entries ("ties", arXiv:2306.01708, after a vote on each sign;
    "magnitude_prune") or at random ("dare_ties", "dare_linear", arXiv:2311.03099).
    """

    method: str = "linear"
    target_model_path: str | Path | None = None
    """The other model; None: the one that training began from."""
    base_model_path: str | Path | None = None
    """What changes are counted from; None: the model that training began from."""
    policy_model_weight: float | None = None
    """Of the trained model; None: 0.5, for changes 1."""
    target_model_weight: float | None = None
    density: float = 0.7
    """The share of its changes that each keeps."""
    t_values: float = 0.5
    """Where on the arc: 0 the trained model, 1 the other one."""
    dtype: str | None = None
    """Of what is written; None: the trained model's."""

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)

    def check(self, model: Any) -> None:
        """ConfigError for what cannot be meant, or merged with `model`."""
        one_of("method", self.method, METHODS)
        for name, value in (("density", self.density), ("t_values", self.t_values)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} must be in [0, 1]")
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ConfigError(f"dtype={self.dtype!r} is none of torch's")
        if self.method == "linear":
            at_least("the sum of both weights", sum(self.weights), 0, above=True)
        if self.method in CHANGES and self.target_model_path is None:
            raise ConfigError(
                f"method={self.method!r} adds the changes of two models, but the one that training "
                "began from has none: name another target_model_path"
            )
        for path in (self.target_model_path, self.base_model_path):
            if path is not None:
                _check_alike(model.config, AutoConfig.from_pretrained(path), path)

    @property
    def weights(self) -> list[float]:
        usual = 1.0 if self.method in CHANGES else 0.5
        given = (self.policy_model_weight, self.target_model_weight)
        return [usual if weight is None else weight for weight in given]

    @property
    def reads_base(self) -> bool:
        return self.method in CHANGES

    def of(self, policy: Tensor, target: Tensor, base: Tensor | None) -> Tensor:
        """One tensor of the merged model, in fp32."""
        p, t = policy.float(), target.float()
        if self.method == "linear":
            one, other = self.weights
            return (one * p + other * t) / (one + other)
        if self.method == "slerp":
            return arc(p, t, self.t_values)
        assert base is not None
        b = base.float()
        return b + mixed([p - b, t - b], self.weights, self.method, self.density, "total")


def _check_alike(config: Any, other: Any, path: str | Path) -> None:
    """ConfigError where two models differ in a size."""
    for name in SIZES:
        sizes = getattr(config, name, None), getattr(other, name, None)
        if sizes[0] != sizes[1]:
            raise ConfigError(f"{path}: {name} is {sizes[1]}, of the trained model {sizes[0]}")


def arc(one: Tensor, other: Tensor, t: float) -> Tensor:
    """The point at `t` of the arc from `one` to `other`, taken as vectors; of nearly parallel ones
    (or of nothing) the point on the line."""
    cosine = (one * other).sum() / (one.norm() * other.norm())
    if not cosine.abs() < 0.9995:  # nor is what is no number
        return one.lerp(other, t)
    angle = cosine.acos()
    return (((1 - t) * angle).sin() * one + (t * angle).sin() * other) / angle.sin()


class MergeModelCallback(TrainerCallback):
    """Writes the trained model, merged with another one, into `merged`: below output_dir when the
    run ends, or into each checkpoint. An adapter is merged into its base first."""

    def __init__(
        self,
        merge_config: MergeConfig | None = None,
        merge_at_every_checkpoint: bool = False,
        push_to_hub: bool = False,
    ) -> None:
        if push_to_hub:
            raise ConfigError("push_to_hub: upload the folder `merged` after the run")
        self.config = merge_config or MergeConfig()
        self.at_checkpoints = merge_at_every_checkpoint
        self.start: dict[str, Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        config, model = self.config, more["model"]
        config.check(model)
        wanted = config.base_model_path if config.reads_base else config.target_model_path
        if wanted is not None or isinstance(model, PeftModel):
            return
        if state.global_step:
            name = "base_model_path" if config.reads_base else "target_model_path"
            raise ConfigError(
                f"a resumed run no longer has the model that training began from: name it, {name}="
            )
        self.start = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.at_checkpoints:
            self._merge(Path(args.output_dir) / f"checkpoint-{state.global_step}", more)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not self.at_checkpoints:
            self._merge(Path(args.output_dir), more)

    def _merge(self, folder: Path, more: Mapping[str, Any]) -> None:
        if not more["trainer"].world.is_main:
            return
        config, model = self.config, more["model"]
        merged = copy.deepcopy(model)
        if isinstance(model, PeftModel):
            merged = merged.merge_and_unload()
        target = self._tensors(model, config.target_model_path)
        base = self._tensors(model, config.base_model_path) if config.reads_base else None
        merge_into(merged, target, base, config)
        if config.dtype is not None:
            merged = merged.to(getattr(torch, config.dtype))
        save_model(merged, folder / FOLDER, more["processing_class"])

    def _tensors(self, model: nn.Module, path: str | Path | None) -> Mapping[str, Tensor]:
        """Those of the model at `path`, or of the one that training began from."""
        if path is not None:
            return AutoModelForCausalLM.from_pretrained(path).state_dict()
        if isinstance(model, PeftModel):
            return copy.deepcopy(model).unload().state_dict()
        assert self.start is not None
        return self.start


@torch.no_grad()
def merge_into(
    model: nn.Module, target: Mapping[str, Tensor], base: Mapping[str, Tensor] | None,
    config: MergeConfig,
) -> None:  # fmt: skip
    """Merge `target` into `model`. ConfigError where the two do not have the same tensors."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        parts = [target.get(name), tensor if base is None else base.get(name)]
        if any(part is None or part.shape != tensor.shape for part in parts):
            shapes = [None if part is None else tuple(part.shape) for part in parts]
            raise ConfigError(
                f"{name}{tuple(tensor.shape)} is {shapes[0]} in the model to merge with"
                + ("" if base is None else f" and {shapes[1]} in the base")
            )
        other, origin = (part.to(tensor.device) for part in parts if part is not None)
        tensor.copy_(config.of(tensor, other, None if base is None else origin))


__all__ = ["MergeConfig", "MergeModelCallback"]
