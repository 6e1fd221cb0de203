"""Trainable tokens: chosen rows of the embedding (and of a head tied to it) are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.config import LayerConfig
from topwork.peft.graft import Graft
from topwork.peft.targets import base_of, sharing, walk


@dataclass(kw_only=True)
class TrainableTokensConfig(LayerConfig):
    """Train the embeddings of `token_indices` and of no other tokens."""

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True
    """Start at the tokens' embeddings; False: normal."""
    peft_type: str = "TRAINABLE_TOKENS"


class TrainableTokens(Graft):
    KINDS = ("embedding", "linear")
    config: TrainableTokensConfig

    @classmethod
    def settle(cls, config: TrainableTokensConfig, model: nn.Module) -> TrainableTokensConfig:
        """Without targets: the input embedding."""
        if config.target_modules is not None:
            return config
        get = getattr(model, "get_input_embeddings", None)
        words = get() if callable(get) else None
        names = [n for n, m in walk(model) if words is not None and base_of(m) is base_of(words)]
        return replace(config, target_modules=[names[0] if names else "embed_tokens"])

    @classmethod
    def companions(
        cls, config: TrainableTokensConfig, model: nn.Module, paths: list[str]
    ) -> dict[str, str]:
        """A head whose weight is that of a targeted embedding."""
        return sharing(model, paths)

    @property
    def places(self) -> Tensor:
        return torch.tensor(self.config.token_indices, device=self.layer.device)

    def create(self) -> dict[str, Tensor | nn.Module]:
        rows = sites.read_weight(self.base).detach()
        rows = rows.t() if self.site.kind == "embedding" else rows
        places = self.places
        if not len(places) or int(places.max()) >= len(rows) or int(places.min()) < 0:
            raise ConfigError(f"token_indices must be of the {len(rows)} rows of {self.path}")
        values = rows[places].float().clone()
        values = values if self.config.init_weights else values.normal_()
        return {"trainable_tokens_delta": nn.Parameter(values)}

    def instead(self, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return self._embedded(base) if self.site.kind == "embedding" else base

    def _embedded(self, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(ids: Tensor) -> Tensor:
            y = base(ids)
            scale = getattr(self.base, "embed_scale", getattr(self.base, "scale", None))
            which = torch.full((self.site.inputs,), -1, device=ids.device)
            which[self.places] = torch.arange(len(self.places), device=ids.device)
            row = which[ids]
            trained = F.embedding(row.clamp(min=0), self["trainable_tokens_delta"]).to(y.dtype)
            if scale is not None:
                trained = trained * scale
            return torch.where(row[..., None] >= 0, trained, y)

        return run

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.site.kind == "embedding":
            return y
        logits = F.linear(x, self["trainable_tokens_delta"].to(x.dtype))
        bias = getattr(self.base, "bias", None)
        places = self.places
        logits = logits if bias is None else logits + bias[places]
        return y.index_copy(-1, places, logits)

    def swapped(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(weight, places, rows), where a head is a plain frozen weight but for these rows."""
        base: Any = self.base
        if type(base) is not nn.Linear or base.bias is not None or base.weight.requires_grad:
            return None
        return base.weight, self.places, self["trainable_tokens_delta"]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = weight.t() if self.site.kind == "embedding" else weight
        rows = rows.index_copy(0, self.places, self["trainable_tokens_delta"].float())
        return (rows.t() if self.site.kind == "embedding" else rows), bias


CONFIG = TrainableTokensConfig
GRAFT = TrainableTokens
