"""Policy-gradient losses per token, and how they are summed, as plain functions.

Letters: N trained tokens of A answers; `owners` [N] says whose each token is. Everything about an
answer (advantage, sequence ratio) is spread over its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.training.distributed import World

# How the loss per token becomes one number: mean of the answers' means, mean over all tokens, sum
# over a constant length, or mean of the answers' sums.
AGGREGATION = {
    "grpo": "answers",
    "sapo": "answers",
    "gmpo": "answers",
    "bnpo": "tokens",
    "dapo": "tokens",
    "cispo": "tokens",
    "vespo": "tokens",
    "dr_grpo": "constant",
    "luspo": "sums",
}
LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class PolicyLoss:
    """Which loss, and its constants; names as in GRPOConfig."""

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    level: str = "token"
    beta: float = 0.0
    bias_correction: bool = True
    sapo_pos: float = 1.0
    sapo_neg: float = 1.05
    vespo_pos: tuple[float, float] = (2.0, 3.0)  # k, λ
    vespo_neg: tuple[float, float] = (3.0, 2.0)

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which the clip leaves a ratio as it is."""
        if self.loss_type == "gmpo":
            return math.exp(-self.epsilon), math.exp(self.high)
        return 1 - self.epsilon, 1 + self.high


@dataclass(frozen=True)
class Spread:
    """Sums and means over answers, spread back over their tokens."""

    owners: Tensor
    answers: int

    def sums(self, values: Tensor) -> Tensor:
        """[N] → [A]."""
        return values.new_zeros(self.answers).index_add(0, self.owners, values)

    def counts(self) -> Tensor:
        return torch.bincount(self.owners, minlength=self.answers).float()

    def means(self, values: Tensor) -> Tensor:
        return self.sums(values) / self.counts().clamp_min(1)

    def over(self, answers: Tensor) -> Tensor:
        """[A] → [N]."""
        return answers[self.owners]


def log_ratio(new: Tensor, old: Tensor, spread: Spread, level: str) -> Tensor:
    """log(π/π_old) [N]: of the token, or the mean over its answer (GSPO, arXiv:2507.18071)."""
    ratio = new - old
    return ratio if level == "token" else spread.over(spread.means(ratio))


def kl_k3(new: Tensor, ref: Tensor) -> Tensor:
    """The k3 estimate of KL(π ‖ π_ref) per token, never negative (Schulman 2020)."""
    gap = ref - new
    return gap.exp() - gap - 1


def vespo_weight(ratio: Tensor, advantage: Tensor, spread: Spread, loss: PolicyLoss) -> Tensor:
    """φ(w) = e^λ · w^k · e^(-λw) [N] for the product w of an answer's ratios [N], given as their
    logarithms; φ(1) = 1."""
    log_w = spread.over(spread.sums(ratio.detach().clamp(-20, 20))).clamp(math.log(1e-8), 20)
    good = advantage >= 0
    k = torch.where(good, loss.vespo_pos[0], loss.vespo_neg[0])
    lam = torch.where(good, loss.vespo_pos[1], loss.vespo_neg[1]).clamp_min(1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp()


def geometric_ratio(
    new: Tensor, old: Tensor, advantage: Tensor, spread: Spread, loss: PolicyLoss
) -> Tensor:
    """The geometric mean of an answer's ratios [N], each held where the `advantage` [N] would draw
    it beyond the clip (GMPO, arXiv:2507.20673)."""
    apart = new - old
    held = apart.clamp(-loss.epsilon, loss.high)
    chosen = torch.where(advantage > 0, torch.min(apart, held), torch.max(apart, held))
    return spread.over(spread.means(chosen)).exp()


def token_losses(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    spread: Spread,
    loss: PolicyLoss,
    ref: Tensor | None = None,
    correction: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The loss of each token [N] from log-probabilities [N] and the answers' advantages [A].

    `correction` [N]: the weight of each token for what its sampler made of the policy, see
    `corrected`; `keep` [N]: which tokens move the policy, while all are held to the reference.
    GRPO arXiv:2402.03300 (dapo 2503.14476, dr_grpo 2503.20783), cispo 2506.13585, sapo 2511.20347,
    gmpo 2507.20673; gspo is `level="sequence"`.
    """
    given = spread.over(advantage)
    ratio = log_ratio(new, old, spread, loss.level).exp()
    if loss.loss_type == "cispo":
        out = -ratio.clamp(max=loss.high).detach() * given * new
    elif loss.loss_type == "sapo":
        heat = torch.where(given > 0, loss.sapo_pos, loss.sapo_neg)
        out = -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * given
    elif loss.loss_type == "gmpo":
        out = -geometric_ratio(new, old, given, spread, loss) * given
    elif loss.loss_type == "vespo":
        apart = new - old
        if correction is not None:  # within the product, which is of whole answers
            apart, correction = apart + correction.clamp_min(1e-8).log(), None
        out = -vespo_weight(apart, given, spread, loss) * given * new
    else:
        first = ratio if loss.delta is None else ratio.clamp(max=loss.delta)
        out = clipped_losses(first, ratio, given, loss.epsilon, loss.high)
    if correction is not None:
        out = out * correction
    if keep is not None:
        out = out * keep
    if loss.beta and ref is not None:
        divergence = kl_k3(new, ref)
        out = out + loss.beta * (divergence * ratio if loss.bias_correction else divergence)
    return out


def clipped_losses(
    first: Tensor, ratio: Tensor, advantage: Tensor, low: float, high: float
) -> Tensor:
    """PPO's pessimistic choice (arXiv:1707.06347) between `first` and the clipped `ratio`."""
    return -torch.min(first * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def near_enough(
    new: Tensor, drawn: Tensor, advantage: Tensor, spread: Spread, bound: float
) -> Tensor:
    """Which tokens [N] are of an answer that did well, or from which the policy has not moved away:
    the mean of log μ/π over the answer, `drawn` [N] being log μ, is at most `bound` (the sequence
    mask of DeepSeek-V3.2, arXiv:2512.02556)."""
    apart = spread.means(drawn - new.detach())
    return spread.over((advantage >= 0) | (apart <= bound))


# -- the sampler and the trainer -----------------------------------------------------------------

CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class Correction:
    """How π/μ is bounded, π being the trainer's policy when the answers were drawn and μ what they
    were drawn from: truncated to [low, high], or set to nothing beyond; for each token, or for the
    product over an answer."""

    mode: str = "none"
    low: float | None = None
    high: float | None = 3.0

    def weights(self, old: Tensor, sampled: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
        """The weight of each token [N], and which ones are beyond the bounds.

        `sampled` [N] is NaN where the sampler did not tell: such a token's own ratio is 1.
        """
        gap = (old - sampled).nan_to_num(0.0)
        if self.mode.startswith("sequence"):
            gap = spread.over(spread.sums(gap))
        ratio = gap.exp()
        beyond = torch.zeros_like(ratio, dtype=torch.bool)
        if self.low is not None:
            beyond |= ratio < self.low
        if self.high is not None:
            beyond |= ratio > self.high
        if self.mode.endswith("mask"):
            return ratio.masked_fill(beyond, 0.0), beyond
        if self.low is None and self.high is None:
            return ratio, beyond
        return ratio.clamp(self.low, self.high), beyond

    def told(
        self, weights: Tensor, beyond: Tensor, old: Tensor, sampled: Tensor
    ) -> dict[str, Tensor]:
        """What is logged of it, per token."""
        gap = (old - sampled).abs()
        share = "masked" if self.mode.endswith("mask") else "truncated"
        return {
            "sampling/logp_difference": gap[~gap.isnan()],
            "sampling/ratio": weights,
            f"sampling/{share}_fraction": beyond.float(),
        }


def total(losses: Tensor, spread: Spread, loss_type: str) -> Tensor:
    """The sum that `units` normalises."""
    if AGGREGATION[loss_type] == "answers":
        return spread.means(losses).sum()
    return losses.sum()


def units(loss_type: str, answers: int, tokens: int, longest: int) -> float:
    """What `total` is divided by, summed over a whole step: answers, tokens, or A · max length."""
    kind = AGGREGATION[loss_type]
    if kind == "tokens":
        return tokens
    return answers * longest if kind == "constant" else answers


def clipped_shares(ratio: Tensor, advantage: Tensor, loss: PolicyLoss) -> dict[str, Tensor]:
    """Which tokens the clip holds back, 0 or 1 each [N]."""
    least, most = loss.bounds
    low = (ratio < least) & (advantage < 0)
    high = (ratio > most) & (advantage > 0)
    return {
        "clip_ratio/low_mean": low.float(),
        "clip_ratio/high_mean": high.float(),
        "clip_ratio/region_mean": (low | high).float(),
    }


# -- advantages ----------------------------------------------------------------------------------

SCALES = ("group", "batch", "none")


def nan_mean(values: Tensor, dim: int) -> Tensor:
    return values.nanmean(dim, keepdim=True)


def nan_std(values: Tensor, dim: int) -> Tensor:
    """The sample standard deviation of what is no NaN; 0 for a single value."""
    known = ~values.isnan()
    gap = (values - nan_mean(values, dim)).nan_to_num(0) ** 2
    count = known.sum(dim, keepdim=True)
    return (gap.sum(dim, keepdim=True) / (count - 1).clamp_min(1)).sqrt()


def group_advantages(
    rewards: Tensor, weights: Tensor, scale: str = "group", normalise_first: bool = False
) -> Tensor:
    """Advantages [P, G] from each function's rewards [P, G, F] (NaN: not judged).

    The weighted rewards less the mean of their group, over its (or the batch's) deviation; with
    `normalise_first` each function is normalised in its group before they are summed (GDPO). An
    answer that no function judged gets 0.
    """
    if scale not in SCALES:
        raise ConfigError(f"scale_rewards={scale!r}; one of {SCALES}")
    unknown = rewards.isnan().all(-1)
    if normalise_first:
        rewards = (rewards - nan_mean(rewards, 1)) / (nan_std(rewards, 1) + 1e-4)
    summed = (rewards * weights).nansum(-1).masked_fill(unknown, float("nan"))
    if normalise_first:
        flat = summed.reshape(1, -1)
        found = (flat - nan_mean(flat, 1)) / (nan_std(flat, 1) + 1e-4)
        return found.view(summed.shape).nan_to_num(0)
    found = summed - nan_mean(summed, 1)
    if scale == "group":
        found = found / (nan_std(summed, 1) + 1e-4)
    elif scale == "batch":
        found = found / (nan_std(summed.reshape(1, -1), 1) + 1e-4)
    return found.nan_to_num(0)


def whitened(
    parts: Sequence[Tensor], world: World, centre: bool = True, eps: float = 1e-8
) -> list[Tensor]:
    """`parts` of a whole step, over all processes, at deviation 1 and (`centre`) mean 0."""
    count, first = world.total(
        sum(len(p) for p in parts), sum(float(p.double().sum()) for p in parts)
    )
    mean = first / max(1.0, count)
    (second,) = world.total(sum(float(((p.double() - mean) ** 2).sum()) for p in parts))
    deviation = (second / max(1.0, count - 1)) ** 0.5 + eps
    return [(p - mean) / deviation + (0.0 if centre else mean) for p in parts]


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO (arXiv:2402.14740): each reward [P, G] less the mean of the others of its group."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * count / max(1, count - 1)


def sequence_losses(
    new: Tensor, old: Tensor, advantage: Tensor, spread: Spread, epsilon: float, high: float
) -> Tensor:
    """PPO's clipped loss of whole answers [A], their ratio being the product of their tokens'."""
    ratio = spread.sums(new - old).exp()
    return clipped_losses(ratio, ratio, advantage, epsilon, high)
