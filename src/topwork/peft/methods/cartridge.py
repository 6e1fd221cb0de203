"""Cartridges (arXiv:2506.06266): a trained key/value cache, started from a text's, its first tokens
frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft.methods.prefix_tuning import keyed
from topwork.peft.prompts import Prompt, PromptLearningConfig, keys_values_of


@dataclass(kw_only=True)
class CartridgeConfig(PromptLearningConfig):
    """A key and a value for each virtual token, layer and key/value head."""

    num_frozen_tokens: int = 1
    """The first ones stay as they start: a model leans on its first token (an attention sink)."""
    peft_type: str = "CARTRIDGE"

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (most is not None and self.num_frozen_tokens > most):
            raise ConfigError(f"num_frozen_tokens={self.num_frozen_tokens} must be in [0, {most}]")


class Cartridge(Prompt):
    is_prefix: ClassVar[bool] = True

    def __init__(self, config: CartridgeConfig, words: nn.Module) -> None:
        nn.Module.__init__(self)
        self.config = config
        start = torch.randn(config.num_virtual_tokens or 0, self.width(config))
        frozen = config.num_frozen_tokens
        self.register_buffer("frozen_embedding", start[:frozen].clone() if frozen else None)
        self.trainable_embedding = nn.Parameter(start[frozen:].clone())

    @staticmethod
    def count(config: Any) -> int:
        return config.num_virtual_tokens

    @staticmethod
    def width(config: Any) -> int:
        return config.token_dim * 2 * config.num_layers

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        return keyed(super().settle(config, model), model)

    @property
    def tokens(self) -> Tensor:
        """[n, width]."""
        frozen = self._buffers["frozen_embedding"]
        trained = self.trainable_embedding
        return trained if frozen is None else torch.cat((frozen, trained))

    def forward(self, batch: int, task_ids: Tensor | None = None) -> Tensor:
        return self.tokens.expand(batch, *self.tokens.shape)

    def saved(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.tokens.detach()}

    @torch.no_grad()
    def fill(self, tokens: Tensor) -> None:
        """Take keys and values [n, width], the frozen ones too."""
        at = self.config.num_frozen_tokens
        if at:
            self.get_buffer("frozen_embedding").copy_(tokens[:at])
        self.trainable_embedding.copy_(tokens[at:])

    def load(self, given: dict[str, Tensor], source: str) -> None:
        self.fill(self.taken(given, source))


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any, tokenizer: Any, text: str, adapter_name: str | None = None
) -> None:
    """Start a cartridge from the keys and values that the bare model has for the first tokens of
    `text`, which must be at least as many as the virtual ones."""
    name = adapter_name or model.active_adapters[0]
    prompt = dict(model.prompt_encoder.items()).get(name)
    if not isinstance(prompt, Cartridge):
        raise ConfigError(f"{name!r} is no cartridge")
    count = prompt.config.num_virtual_tokens or 0
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) < count:
        raise ConfigError(f"the text has {len(ids)} tokens, the cartridge {count}")
    device = prompt.trainable_embedding.device
    with model.disable_adapter():
        layers = keys_values_of(model.get_base_model(), torch.tensor([ids[:count]], device=device))
    parts = [part.flatten(1) for pair in layers for part in pair]  # [n, heads x size] each
    prompt.fill(torch.cat(parts, 1).float())


CONFIG = CartridgeConfig
PROMPT = Cartridge
