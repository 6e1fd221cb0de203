"""X-LoRA's two passes (arXiv:2402.07148): the bare model's last hidden states give the scalings by
which LoRA adapters count, token by token and layer by layer, in the second pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.nn.cache import KVCache
from topwork.ops.recompute import Carried
from topwork.peft import inject
from topwork.peft.invocation import laid
from topwork.peft.parts import telling, told


@dataclass(frozen=True)
class Scalings:
    """[B, T, layers, adapters]; `keep` [B, T]: the real tokens of padded rows."""

    values: Tensor
    keep: Tensor | None = None

    def part(self, shape: torch.Size, dim: int, index: Tensor) -> Scalings:
        values = laid(self.values, self.keep, shape)
        return Scalings(values.index_select(dim, index.to(values.device)))


SCALINGS: Carried[Scalings] = told(Carried("topwork.scalings"))


def scaling(layer: int, y: Tensor) -> Tensor:
    """Those of one layer for its output `y` [..., out]: [..., adapters]."""
    state = SCALINGS.get()
    if state is None:
        raise ConfigError(
            "X-LoRA's scalings are not known here: call the PeftModel (or its backbone or "
            "generate); under transformers' gradient checkpointing they are lost"
        )
    return laid(state.values[:, :, layer], state.keep, y.shape).to(y.device)


ASKED = frozenset(
    {
        "clear_scalings_log",
        "disable_scalings_logging",
        "enable_scalings_logging",
        "get_bucketed_scalings_log",
        "get_global_scaling_weight",
        "get_latest_scalings",
        "get_scalings_log",
        "set_global_scaling_weight",
        "set_topk_lora",
    }
)
"""What is asked of the classifier through the `PeftModel`."""


class Router(nn.Module):
    """The classifier: hidden states [B, T, C] → scalings [B, T, layers, adapters]."""

    weighs: ClassVar[bool] = False

    def __init__(self, config: Any, owner: str, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.owner, self.count = config, owner, layers
        self.latest: Tensor | None = None
        """The last scalings."""
        self.log: list[Tensor] = []
        self.logging = False
        outputs = len(config.adapters) * (layers if config.layerwise_scalings else 1)
        width, made = config.hidden_size, []
        for _ in range(config.xlora_depth - 1):
            made += [nn.Linear(width, config.xlora_size), nn.ReLU()]
            made += [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p else []
            width = config.xlora_size
        self.layers = nn.Sequential(*made, nn.Linear(width, outputs)).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        config = self.config
        logits = self.layers(hidden.to(self.layers[-1].weight.dtype))  # type: ignore[union-attr]
        values = logits.unflatten(-1, (-1, len(config.adapters)))
        values = values.expand(*values.shape[:2], self.count, -1)
        if config.enable_softmax:
            values = (values / config.softmax_temperature).softmax(-1)
        self.latest = values.detach()
        if self.logging:
            self.log.append(values.detach())
        if config.top_k_lora is not None:
            best = values.topk(config.top_k_lora, -1).indices
            values = values * torch.zeros_like(values).scatter(-1, best, 1.0)
        if config.enable_softmax_topk:
            on = values != 0
            values = values.masked_fill(~on, float("-inf")).softmax(-1).masked_fill(~on, 0.0)
        return values * config.global_scaling_weight

    def set_topk_lora(self, value: int | None) -> None:
        """Let only the best `value` adapters of each token count; None: all."""
        self.config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """A factor on every adapter."""
        self.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self.config.global_scaling_weight

    def get_latest_scalings(self) -> Tensor | None:
        """[B, T, layers, adapters] of the last call, before the best are taken."""
        return self.latest

    def enable_scalings_logging(self) -> None:
        self.logging = True

    def disable_scalings_logging(self) -> None:
        self.logging = False

    def clear_scalings_log(self) -> None:
        self.log.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """Those of every call while logging was on."""
        return list(self.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """T → the places in the log and the scalings of that many tokens."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for at, values in enumerate(self.log):
            places, those = found.setdefault(values.shape[1], ([], []))
            places.append(at)
            those.append(values)
        return found

    @contextmanager
    def within(self, hidden: Tensor, keep: Tensor | None = None) -> Iterator[None]:
        """Within it the adapters count by the scalings for `hidden`."""
        with telling(SCALINGS, Scalings(self(hidden), keep)):
            yield

    def through(self, model: Any, input_ids: Tensor | None, **call: Any) -> Tensor:
        """Both passes of a model of ours; hidden states [B, T, C]."""
        cache = call.pop("cache", None)
        if cache is not None and not isinstance(cache, TwinCache):
            raise ConfigError("X-LoRA reads twice; take the model's new_cache()")
        with torch.no_grad(), inject.disabled(model):
            bare = model.backbone(input_ids, cache=cache and cache.bare, **call)
        mask = call.get("attention_mask")
        keep = mask.bool() if mask is not None and mask.shape == bare.shape[:2] else None
        with self.within(bare, keep):
            return model.backbone(input_ids, cache=cache and cache.inner, **call)

    def new_cache(self, model: Any, inner: KVCache, *args: Any, **kwargs: Any) -> TwinCache:
        """One for each pass."""
        return TwinCache(inner, model.new_cache(*args, **kwargs))

    @contextmanager
    def hooked(self, model: Any) -> Iterator[None]:
        """Within it calls of `model`, of transformers, run both passes."""

        def before(module: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            if call.get("past_key_values") is not None:
                raise ConfigError("X-LoRA on transformers' models goes without past_key_values")
            first = {k: v for k, v in call.items() if k != "labels"}
            first |= {"output_hidden_states": True, "use_cache": False}
            with torch.no_grad(), inject.disabled(module):
                hidden = module.forward(*args, **first).hidden_states[-1]
            return Scalings(self(hidden)), call

        with SCALINGS.told_by(model, before):
            yield


class TwinCache(KVCache):
    """The caches of both passes."""

    def __init__(self, inner: KVCache, bare: KVCache) -> None:
        super().__init__(inner.stores)
        self.inner, self.bare = inner, bare

    def crop(self, length: int) -> None:
        self.inner.crop(length)
        self.bare.crop(length)

    def select(self, rows: Tensor) -> None:
        self.inner.select(rows)
        self.bare.select(rows)
