"""The critic of PPO: a value for every token's state, its advantages, its loss, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from topwork.data.packing import Batch
from topwork.errors import CheckpointError, ConfigError
from topwork.models import AutoModelForSequenceClassification
from topwork.objectives.policy import Spread
from topwork.objectives.reward import with_head
from topwork.objectives.setup import adapted, load_model
from topwork.objectives.vocabulary import as_large
from topwork.peft import PeftConfig, TaskType

FOLDER, FILE = "critic", "value_head.safetensors"


class ValueHead(nn.Module):
    """A value of each hidden state [N, C] → [N] fp32; it begins at nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, Path(folder) / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take up a saved head. CheckpointError when it is of another width."""
        found = load_file(folder / FILE)
        for name, tensor in self.state_dict().items():
            if found[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{folder / FILE}: {name} is {list(found[name].shape)}, the model's hidden "
                    f"states want {list(tensor.shape)}"
                )
            tensor.copy_(found[name])


class ActorCritic(nn.Module):
    """A policy and its critic as one model for the trainer.

    `critic` is a `ValueHead` over the policy's own hidden states, or a model of its own, a sequence
    classifier with one label. Saved, the policy lies in the folder itself and the critic below it.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    @property
    def shared(self) -> bool:
        return isinstance(self.critic, ValueHead)

    def values(self, batch: Batch, seen: Tensor) -> Tensor:
        """The value [N] fp32 before each trained token; `seen` [N, C]: the policy's states."""
        critic: Any = self.critic
        if self.shared:
            return critic(seen)
        hidden = critic.backbone(batch.input_ids, lengths=batch.lengths)
        return critic.head(hidden[0, batch.positions])[:, 0].float()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for part in (self.policy, self.critic):
            if not isinstance(part, ValueHead):
                part.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def save_pretrained(self, folder: str | Path) -> None:
        self.policy.save_pretrained(folder)  # type: ignore[operator]
        self.critic.save_pretrained(Path(folder) / FOLDER)  # type: ignore[operator]


def with_critic(
    policy: nn.Module, given: nn.Module | str | Path | None, config: PeftConfig | None,
    args: Any,
) -> ActorCritic:  # fmt: skip
    """`policy` with a new value head; one that was saved; or the model (or the name of one) that
    `given` says, adapted as `config` does the policy."""
    saved = None if given is None or isinstance(given, nn.Module) else Path(given)
    if given is None or (saved is not None and (saved / FILE).is_file()):
        if not callable(getattr(policy, "backbone", None)):
            raise ConfigError("a shared critic needs a model of topwork's; pass value_model=…")
        any_policy: Any = policy
        head = ValueHead(any_policy.get_input_embeddings().weight.shape[1])
        if saved is not None:
            head.load(saved)
        return ActorCritic(policy, head.to(next(policy.parameters()).device))
    if given is policy:
        raise ConfigError("value_model is the policy itself: leave it out for a shared trunk")
    critic: Any = load_model(given, args, AutoModelForSequenceClassification, num_labels=1)
    labels = getattr(critic, "score", None)
    if not callable(getattr(critic, "backbone", None)) or getattr(labels, "out_features", 0) != 1:
        raise ConfigError("value_model must be a sequence classifier of topwork's with one label")
    as_large(critic, policy)
    return ActorCritic(policy, adapted(critic, with_head(config, TaskType.SEQ_CLS)))


# -- formulas ------------------------------------------------------------------------------------


def advantages(rewards: Tensor, values: Tensor, spread: Spread, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates [N] (arXiv:1506.02438) of answers one after the other.

    Aₜ = Σₖ (γλ)ᵏ δₜ₊ₖ, δₜ = rₜ + γ vₜ₊₁ - vₜ, where an answer's last token has nothing behind it.
    """
    counts = spread.counts().long()
    longest = int(counts.max())
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(rewards), device=rewards.device) - starts[spread.owners]
    rows = rewards.new_zeros(2, len(counts), longest + 1)
    rows[0, spread.owners, place] = rewards
    rows[1, spread.owners, place] = values
    found, behind = torch.zeros_like(rows[0]), rewards.new_zeros(len(counts))
    for t in reversed(range(longest)):
        gap = rows[0, :, t] + gamma * rows[1, :, t + 1] - rows[1, :, t]
        behind = gap + gamma * lam * behind
        found[:, t] = behind
    return found[spread.owners, place]


def with_score(rewards: Tensor, scores: Tensor, spread: Spread) -> Tensor:
    """`rewards` [N] with each answer's score [A] at its last token."""
    counts = spread.counts().long()
    some = counts > 0
    return rewards.index_add(0, (counts.cumsum(0) - 1)[some], scores[some].to(rewards.dtype))


def value_losses(new: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error [N], the worse of the value's and of the value's kept within ±`clip`
    of `old`; and which tokens that clip holds back."""
    plain = (new - returns) ** 2
    bounded = (old + (new - old).clamp(-clip, clip) - returns) ** 2
    return 0.5 * torch.max(plain, bounded), bounded > plain
