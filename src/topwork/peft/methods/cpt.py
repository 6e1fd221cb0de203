"""Context-aware prompt tuning (arXiv:2410.17222): the tokens of examples stand before the input,
and their embeddings are moved a little."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError, TopworkWarning
from topwork.peft.config import one_of
from topwork.peft.prompts import Lengths, Prompt, PromptLearningConfig

LEAST = 1e-10
"""The radius of tokens that stay."""


@dataclass(kw_only=True)
class CPTConfig(PromptLearningConfig):
    """Each context token moves within a ball around its embedding.

    `cpt_tokens_type_mask` numbers the parts of the examples: of the first one 1 is the template
    before its input, 2 its input, 3 the template before its label and 4 its label; of the second
    one 5 to 8, and so on; 0 is of no part. Labels (4, 8, …) stay as they are and count in the loss.
    """

    num_transformer_submodules: int | None = 1
    cpt_token_ids: list[int] | None = None
    """The context; None: the token 0."""
    cpt_mask: list[int] | None = None
    """Without effect, as in peft; of the context's length."""
    cpt_tokens_type_mask: list[int] | None = None
    """None: all are template."""
    opt_weighted_loss_type: str | None = "none"
    """"decay": labels of earlier examples weigh less."""
    opt_loss_decay_factor: float | None = 1.0
    """By what each example's weight is multiplied, from the last one back."""
    opt_projection_epsilon: float | None = 0.1
    """How far inputs move, times √(width / 2048)."""
    opt_projection_format_epsilon: float | None = 0.1
    """How far templates move."""
    tokenizer_name_or_path: str | None = None
    task_type: str | None = "CAUSAL_LM"
    peft_type: str = "CPT"

    def __post_init__(self) -> None:
        ids = self.cpt_token_ids = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        self.num_virtual_tokens = len(ids)
        super().__post_init__()
        if self.task_type != "CAUSAL_LM":
            raise ConfigError(f"CPT is for task_type='CAUSAL_LM', not {self.task_type!r}")
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            given = getattr(self, name)
            made = [1] * len(ids) if given is None else list(given)
            if len(made) != len(ids):
                raise ConfigError(f"{name} has {len(made)} numbers for {len(ids)} cpt_token_ids")
            if min(made) < 0:
                raise ConfigError(f"{name} must not have negative numbers: {min(made)}")
            setattr(self, name, made)
        if not all(self.cpt_mask or ()):
            warnings.warn(
                "cpt_mask has zeros, which change nothing: leave those tokens out of cpt_token_ids",
                TopworkWarning,
                stacklevel=3,
            )
        one_of("opt_weighted_loss_type", self.opt_weighted_loss_type, ("none", "decay"))
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon"):
            if (getattr(self, name) or 0) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")


class Context(Prompt):
    """Embeddings of the context's tokens, and how far each is moved."""

    weighs: ClassVar[bool] = True
    config: CPTConfig

    def __init__(self, config: CPTConfig, words: nn.Module) -> None:
        super().__init__(config, words)
        self.delta_embedding = nn.Embedding(self.count(config), self.width(config))
        nn.init.zeros_(self.delta_embedding.weight)
        ids, kinds = torch.tensor(config.cpt_token_ids), torch.tensor(config.cpt_tokens_type_mask)
        inputs, labels = kinds % 4 == 2, kinds % 4 == 0
        size = math.sqrt(self.width(config) / 2048)
        radius = torch.full(kinds.shape, float(config.opt_projection_format_epsilon or 0) * size)
        radius[inputs] = float(config.opt_projection_epsilon or 0) * size
        radius[labels] = LEAST
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("kinds", kinds, persistent=False)
        self.register_buffer("radius", radius, persistent=False)
        if not config.inference_mode:
            device = next(words.parameters()).device
            with torch.no_grad():
                self.embedding.weight.copy_(words(ids.to(device)))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        super().requires_grad_(requires_grad)
        self.embedding.requires_grad_(False)
        return self

    def encoded(self, tokens: Tensor) -> Tensor:
        """The embeddings, moved; what an optimiser moved too far is brought back first."""
        delta, radius = self.delta_embedding.weight, self.get_buffer("radius")[:, None]
        with torch.no_grad():
            length = delta.norm(dim=1, keepdim=True)
            delta.mul_(radius / torch.maximum(length, radius))
        stays = (self.get_buffer("kinds") % 4 == 0)[:, None]
        return tokens + torch.where(stays, delta.detach(), delta)

    @torch.no_grad()
    def load(self, given: dict[str, Tensor], source: str) -> None:
        """A file holds the moved embeddings, around which the tokens then move."""
        self.embedding.weight.copy_(self.taken(given, source))
        self.delta_embedding.weight.zero_()

    # -- the loss --------------------------------------------------------------------------------

    def loss(
        self,
        context: Tensor,
        logits: Tensor,
        labels: Tensor,
        kinds: Tensor | None,
        lengths: Lengths,
    ) -> Tensor:
        """The mean over the labels of the context and of the given tokens, weighted by example.

        `context` [documents, n, V] and `logits` [B, T, V] after the context's and the given tokens;
        `labels` [B, T], not shifted; `kinds` [B, T]: the parts of what is given, as in
        `cpt_tokens_type_mask` (None: all are labels).
        """
        kinds = torch.full_like(labels, 4) if kinds is None else kinds.long().to(labels.device)
        n = self.config.num_virtual_tokens
        pairs = zip(_documents(labels, lengths), _documents(kinds, lengths))
        told = [self._following(*pair) for pair in pairs]
        # As the logits lie: behind the contexts of all documents, then behind the given tokens.
        target, weight = (torch.cat([*(d[:n] for d in v), *(d[n:] for d in v)]) for v in zip(*told))
        parts = [part.flatten(0, 1) for part in (context, logits)]
        each = [
            F.cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(parts, target.split([len(part) for part in parts]))
        ]
        return (torch.cat(each) * weight)[target != -100].mean()

    @property
    def own_targets(self) -> int:
        """How many labels the context has."""
        return int((self._context()[0] != -100).sum())

    def total(self, model: Any, context: Tensor) -> Tensor:
        """The summed loss of the context's labels, weighted by example; `context` [documents, n, C]
        are its hidden states in `model`."""
        targets, weights = self._context()
        at = targets != -100
        seen, wanted = context[:, :-1][:, at], targets[at].repeat(len(context))
        logprobs = model.token_logprobs(seen.flatten(0, 1), wanted)
        return -(logprobs * weights[at].repeat(len(context))).sum()

    def _context(self) -> tuple[Tensor, Tensor]:
        """What follows the context's tokens but the last [n - 1], and its weight, where all that is
        given is one more example."""
        given = self.get_buffer("ids").new_zeros(1)
        targets, weights = self._following(given, given + 4)
        return targets[:-2], weights[:-2]

    def _following(self, labels: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """What follows each token of the context and of one document [n + T], and its weight."""
        ids, own = (self.get_buffer(name).to(labels.device) for name in ("ids", "kinds"))
        after = -(-int(own.max()) // 4) * 4  # the given example comes after the context's
        kinds = torch.cat([own, torch.where(kinds > 0, kinds + after, kinds)])[1:]
        counts = (kinds > 0) & (kinds % 4 == 0)
        following = torch.cat([ids, labels])[1:].masked_fill(~counts, -100)
        weights = torch.ones(kinds.shape, device=kinds.device)
        if self.config.opt_weighted_loss_type == "decay":
            found, place = kinds[counts].unique(return_inverse=True)
            weights[counts] = float(self.config.opt_loss_decay_factor or 0) ** (
                len(found) - 1 - place
            )
        return F.pad(following, (0, 1), value=-100), F.pad(weights, (0, 1))


def _documents(values: Tensor, lengths: Lengths) -> tuple[Tensor, ...]:
    return values.unbind(0) if lengths is None else values[0].split(list(lengths))


CONFIG = CPTConfig
PROMPT = Context
