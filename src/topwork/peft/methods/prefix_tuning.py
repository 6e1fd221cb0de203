"""Prefix tuning (arXiv:2101.00190): keys and values of virtual tokens in every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from topwork.peft.config import one_of
from topwork.peft.prompts import Prompt, PromptLearningConfig, sizes_of


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """A trained key and value for each virtual token, layer and key/value head."""

    encoder_hidden_size: int | None = None
    """Of the projection; None: the tokens' width."""
    prefix_projection: bool = False
    """Let them come out of an MLP."""
    init_weights: str | None = None
    """"zero": keys and values start at zero; None: at random."""
    peft_type: str = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("init_weights", self.init_weights, (None, "zero"))


class Prefix(Prompt):
    is_prefix: ClassVar[bool] = True

    def __init__(self, config: PrefixTuningConfig, words: nn.Module) -> None:
        super().__init__(config, words)
        last = self.embedding.weight
        if config.prefix_projection:
            width, wide = config.token_dim or 0, config.encoder_hidden_size or 0
            out = nn.Linear(wide, (config.num_layers or 0) * 2 * width)
            self.transform = nn.Sequential(nn.Linear(width, wide), nn.Tanh(), out)
            last = out.weight
            if config.init_weights:
                nn.init.zeros_(out.bias)
        if config.init_weights:
            nn.init.zeros_(last)

    @staticmethod
    def count(config: Any) -> int:
        return config.num_virtual_tokens

    @staticmethod
    def width(config: Any) -> int:
        return config.token_dim * (1 if config.prefix_projection else 2 * config.num_layers)

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        config = keyed(super().settle(config, model), model)
        return replace(config, encoder_hidden_size=config.encoder_hidden_size or config.token_dim)

    def encoded(self, tokens: Tensor) -> Tensor:
        return self.transform(tokens) if self.config.prefix_projection else tokens


def keyed(config: Any, model: nn.Module) -> Any:
    """`config` with the width and the heads that the model's keys have."""
    sizes = sizes_of(model)
    if not sizes.get("num_key_value_heads"):
        return config
    head = sizes.get("head_dim") or config.token_dim // config.num_attention_heads
    heads = sizes["num_key_value_heads"]
    return replace(config, token_dim=head * heads, num_attention_heads=heads)


CONFIG = PrefixTuningConfig
PROMPT = Prefix
