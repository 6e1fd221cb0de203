"""The mean of the weights over a run, corrected for its lag (BEMA, arXiv:2508.00180): a smoother
model than the last step's, and a reference that follows the policy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.objectives.reference import Reference
from topwork.objectives.setup import at_least
from topwork.peft import PeftModel
from topwork.training import TrainerCallback
from topwork.training.files import save_model

FOLDER = "bema"


class BEMACallback(TrainerCallback):
    """Keeps mean + α·(now - start) of what is trained, and writes the model of it into `bema`
    below output_dir at the end.

    Every `update_freq` steps from `update_after` on (where the start is taken) the mean goes by
    β = age^-`ema_power`, not below `min_ema_multiplier`, to the weights as they are, and α is
    age^-`bias_power`; the age is `lag` + `multiplier`·step. `update_ref_model`: the reference of a
    preference loss is set to it every `ref_model_update_freq` steps from `ref_model_update_after`
    on; with an adapter the reference is an adapter too. `device`: where the mean lies.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
        update_ref_model: bool = False,
        ref_model_update_freq: int = 400,
        ref_model_update_after: int = 0,
    ) -> None:
        for name, value in (("update_freq", update_freq), ("lag", lag),
                            ("ref_model_update_freq", ref_model_update_freq)):  # fmt: skip
            at_least(name, value, 1)
        self.update_freq, self.update_after = update_freq, update_after
        self.ema_power, self.bias_power = ema_power, bias_power
        self.lag, self.multiplier, self.least = lag, multiplier, min_ema_multiplier
        self.device, self.update_ref_model = device, update_ref_model
        self.ref_freq, self.ref_after = ref_model_update_freq, ref_model_update_after
        self.start: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.smooth: dict[str, Tensor] = {}
        """The corrected mean as it was last computed."""

    # -- events ----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.update_ref_model and not _reference_of(more["trainer"]).follows:
            raise ConfigError(
                "update_ref_model needs a reference of its own: give this callback to DPOTrainer "
                "or KTOTrainer, without precompute_ref_log_probs"
            )
        if not self.start or not state.global_step:
            self._begin(more["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        step, model = state.global_step, more["model"]
        if step == self.update_after:
            self._begin(model)
        elif _due(step, self.update_after, self.update_freq):
            self._update(model, step)
        if self.update_ref_model and (
            step == self.ref_after or _due(step, self.ref_after, self.ref_freq)
        ):
            _reference_of(more["trainer"]).take(model, self.smooth)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if more["trainer"].world.is_main:
            with self.applied(more["model"]) as model:
                save_model(model, Path(args.output_dir) / FOLDER, more["processing_class"])

    # -- the mean --------------------------------------------------------------------------------

    def _begin(self, model: nn.Module) -> None:
        self.start = self._now(model)
        self.mean = {name: t.clone() for name, t in self.start.items()}
        self.smooth = {name: t.clone() for name, t in self.start.items()}

    def _update(self, model: nn.Module, step: int) -> None:
        age = self.lag + self.multiplier * step
        beta, alpha = max(age**-self.ema_power, self.least), age**-self.bias_power
        for name, now in self._now(model).items():
            mean = self.mean[name].lerp_(now, beta)
            self.smooth[name] = mean + alpha * (now - self.start[name])

    def _now(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: t.detach().to(self.device, torch.float32, copy=True)
            for name, t in trained(model).items()
        }

    @contextmanager
    def applied(self, model: nn.Module) -> Any:
        """`model` with the corrected mean in place of its weights, for as long as this lasts."""
        held = {name: t.detach().clone() for name, t in trained(model).items()}
        _copy(trained(model), self.smooth)
        try:
            yield model
        finally:
            _copy(trained(model), held)

    # -- checkpoints -----------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        kept = {"start": self.start, "mean": self.mean, "smooth": self.smooth}
        return {f"{part}.{name}": t for part, own in kept.items() for name, t in own.items()}

    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        for part in ("start", "mean", "smooth"):
            own = {
                k.removeprefix(f"{part}."): t for k, t in found.items() if k.startswith(f"{part}.")
            }
            setattr(self, part, {name: t.to(self.device) for name, t in own.items()})


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the active adapter's tensors, or the model's own, by name."""
    if isinstance(model, PeftModel):
        return model.adapter_state(model.active_adapter)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _due(step: int, after: int, every: int) -> bool:
    return step > after and (step - after) % every == 0


def _reference_of(trainer: Any) -> Reference:
    found = getattr(trainer.objective, "reference", None)
    return found if isinstance(found, Reference) else Reference()


__all__ = ["BEMACallback"]
