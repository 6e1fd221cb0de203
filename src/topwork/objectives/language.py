"""What runs over a model of language share, whatever they train it towards."""

from __future__ import annotations

from dataclasses import field

from topwork.objectives.setup import at_least
from topwork.objectives.vocabulary import tokens_of
from topwork.training import TrainingArguments
from topwork.training.familiar import settings


@settings
class LanguageConfig(TrainingArguments):
    """What runs over a model of language share."""

    router_aux_loss_coef: float | None = None
    """Weight of the routers' load-balancing loss in models with experts; None: what the model's
    configuration says; 0: none. Each micro-batch's counts by its units."""
    added_tokens: list[str] = field(default_factory=list)
    """Texts that become tokens of their own. Their rows, which begin as the mean of the others',
    are trained beside an adapter and saved with it."""
    added_special_tokens: list[str] = field(default_factory=list)
    """The same for marks of a template, which decoding may leave out."""
    resize_to_multiple_of: int | None = None
    """Where the added tokens make the embedding grow: rows up to the next multiple."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("router_aux_loss_coef", self.router_aux_loss_coef, 0)
        at_least("resize_to_multiple_of", self.resize_to_multiple_of, 1)
        tokens_of(self)
