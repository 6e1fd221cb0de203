"""P-tuning (arXiv:2103.10385): the virtual tokens come out of a small trained encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from topwork.peft.config import a_share, at_least, one_of
from topwork.peft.prompts import Prompt, PromptLearningConfig


class PromptEncoderReparameterizationType(StrEnum):
    """What the encoder is."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """An MLP of three layers, or a bidirectional LSTM and an MLP of two."""

    encoder_reparameterization_type: str = "MLP"
    """"MLP" or "LSTM"."""
    encoder_hidden_size: int | None = None
    """None: the tokens' width."""
    encoder_num_layers: int = 2
    """Of the LSTM."""
    encoder_dropout: float = 0.0
    """Between the LSTM's layers."""
    peft_type: str = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = str(getattr(kind, "value", kind))
        one_of(
            "encoder_reparameterization_type", self.encoder_reparameterization_type, ("MLP", "LSTM")
        )
        at_least("encoder_num_layers", self.encoder_num_layers, 1)
        a_share("encoder_dropout", self.encoder_dropout)


class PromptEncoder(Prompt):
    def __init__(self, config: PromptEncoderConfig, words: nn.Module) -> None:
        super().__init__(config, words)
        wide, width = config.encoder_hidden_size or 0, config.token_dim or 0
        if config.encoder_reparameterization_type == "MLP":
            sizes = (width, wide, wide, width)
        else:
            self.lstm_head = nn.LSTM(
                width,
                wide,
                config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            sizes = (2 * wide, 2 * wide, width)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        config = super().settle(config, model)
        return replace(config, encoder_hidden_size=config.encoder_hidden_size or config.token_dim)

    def encoded(self, tokens: Tensor) -> Tensor:
        if hasattr(self, "lstm_head"):
            tokens = self.lstm_head(tokens[None])[0][0]
        return self.mlp_head(tokens)


CONFIG = PromptEncoderConfig
PROMPT = PromptEncoder
