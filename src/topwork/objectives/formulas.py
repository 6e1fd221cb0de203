"""The losses of preference learning as functions of log-probabilities, each with its paper.

Letters: c, r the log-ratios log π/π_ref of chosen and rejected answers, Δ their difference (after
the divergence's link), β the strength of the reference, ε the label smoothing. All are [P], one
entry for each pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Dials:
    """What the losses may be set by."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities [P] of chosen and rejected answers under policy and reference.

    `link`: how a log-ratio becomes a score; `*_tokens` [P]: the answers' trained tokens.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    link: Callable[[Tensor], Tensor] = lambda log_ratio: log_ratio

    @property
    def c(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def r(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        return self.link(self.c) - self.link(self.r)

    @property
    def mean_delta(self) -> Tensor:
        """Δ of scores per token."""
        return self.link(self.c) / self.chosen_tokens - self.link(self.r) / self.rejected_tokens


# -- links: f'(ratio) of an f-divergence, as a function of the log-ratio (arXiv:2309.16240) --------


def reverse_kl(log_ratio: Tensor) -> Tensor:
    return log_ratio


def forward_kl(log_ratio: Tensor) -> Tensor:
    return 1 - (-log_ratio).exp()


def js_divergence(log_ratio: Tensor) -> Tensor:
    return math.log(2) + logsigmoid(log_ratio)


def alpha_divergence(alpha: float) -> Callable[[Tensor], Tensor]:
    """(u^(α-1) - 1) / (α - 1), the log at α = 1; the exponent is held below 80."""
    power = alpha - 1
    if abs(power) < 1e-6:
        return reverse_kl
    return lambda log_ratio: (power * log_ratio).clamp(max=80).expm1() / power


DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def link_of(divergence: str, alpha: float) -> Callable[[Tensor], Tensor]:
    """The link of the divergence with this name."""
    if divergence == "alpha_divergence":
        return alpha_divergence(alpha)
    named = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js_divergence": js_divergence}
    return named[divergence]


# -- pairs ---------------------------------------------------------------------------------------


def smoothed(x: Tensor, epsilon: float) -> Tensor:
    """-log σ(x), for a label that is wrong with probability ε."""
    return -(1 - epsilon) * logsigmoid(x) - epsilon * logsigmoid(-x)


def sigmoid(p: Pairs, d: Dials) -> Tensor:
    """DPO (arXiv:2305.18290); with ε the conservative one."""
    return smoothed(d.beta * p.delta, d.label_smoothing)


def hinge(p: Pairs, d: Dials) -> Tensor:
    """SLiC (arXiv:2309.06657)."""
    return (1 - d.beta * p.delta).relu()


def ipo(p: Pairs, d: Dials) -> Tensor:
    """IPO (arXiv:2310.12036), on scores per token as its authors advise."""
    return (p.mean_delta - 1 / (2 * d.beta)) ** 2


def sigmoid_norm(p: Pairs, d: Dials) -> Tensor:
    """DPO on scores per token (arXiv:2411.15124)."""
    return smoothed(d.beta * p.mean_delta, d.label_smoothing)


def robust(p: Pairs, d: Dials) -> Tensor:
    """Unbiased under labels flipped with probability ε < 1/2 (arXiv:2403.00409)."""
    x, e = d.beta * p.delta, d.label_smoothing
    return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)


def exo_pair(p: Pairs, d: Dials) -> Tensor:
    """KL of the pair's policy against the labels 1 - ε, ε (arXiv:2402.00856, eq. 16)."""
    x, e = d.beta * p.delta, d.label_smoothing
    win = x.sigmoid() * (logsigmoid(x) - math.log1p(-e))
    return win + (-x).sigmoid() * (logsigmoid(-x) - math.log(e))


def nca_pair(p: Pairs, d: Dials) -> Tensor:
    """Noise contrast: each answer against the reference (arXiv:2402.05369)."""
    c, r = d.beta * p.c, d.beta * p.r
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


def bco_pair(p: Pairs, d: Dials) -> Tensor:
    """A binary classifier of answers, without its shift (arXiv:2404.04656)."""
    return -logsigmoid(d.beta * p.c) - logsigmoid(-d.beta * p.r)


def sppo_hard(p: Pairs, d: Dials) -> Tensor:
    """Self-play, with winning probabilities 1 and 0 (arXiv:2405.00675)."""
    return (p.c - 0.5 / d.beta) ** 2 + (p.r + 0.5 / d.beta) ** 2


def apo_zero(p: Pairs, d: Dials) -> Tensor:
    """Chosen up, rejected down (arXiv:2408.06266, eq. 7)."""
    return 1 - (d.beta * p.c).sigmoid() + (d.beta * p.r).sigmoid()


def apo_down(p: Pairs, d: Dials) -> Tensor:
    """Both down, rejected more (arXiv:2408.06266, eq. 8)."""
    return (d.beta * p.c).sigmoid() + 1 - (d.beta * (p.c - p.r)).sigmoid()


def discopop(p: Pairs, d: Dials) -> Tensor:
    """Logistic and exponential losses, mixed by the log-ratio (arXiv:2406.08414, eq. 5)."""
    x = d.beta * p.delta
    mixed = (x / d.discopop_tau).sigmoid()
    return (1 - mixed) * -logsigmoid(x) + mixed * (-x).exp()


PAIRWISE: dict[str, Callable[[Pairs, Dials], Tensor]] = {
    f.__name__: f
    for f in (
        sigmoid, hinge, ipo, sigmoid_norm, robust, exo_pair, nca_pair, bco_pair, sppo_hard,
        apo_zero, apo_down, discopop,
    )
}  # fmt: skip
"""Losses of each pair by itself."""
LINKED = ("sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "discopop")
"""Those that are built on Δ, so that any divergence fits."""
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")
"""Those that read ε."""


# -- all pairs of a step together: stochastic dominance (arXiv:2406.05882) -------------------------


def aot(p: Pairs, d: Dials) -> Tensor:
    """The sorted margins of the policy above those of the reference."""
    margins, order = (p.chosen - p.rejected).sort(stable=True)
    ours = margins - (p.ref_chosen - p.ref_rejected).sort().values
    return smoothed(d.beta * ours, d.label_smoothing)[order.argsort()]


def aot_unpaired(p: Pairs, d: Dials) -> Tensor:
    """The sorted chosen log-ratios above the sorted rejected ones."""
    c, order = p.c.sort(stable=True)
    return smoothed(d.beta * (c - p.r.sort().values), d.label_smoothing)[order.argsort()]


TOGETHER: dict[str, Callable[[Pairs, Dials], Tensor]] = {"aot": aot, "aot_unpaired": aot_unpaired}
"""Losses that compare the pairs of a whole step with one another."""


# -- single answers ------------------------------------------------------------------------------


def kto(log_ratio: Tensor, good: Tensor, kl: Tensor | float, beta: float) -> Tensor:
    """1 - σ(±β(log-ratio - KL)), + for good answers (arXiv:2402.01306, eq. 7)."""
    sign = 2 * good - 1
    return 1 - (beta * sign * (log_ratio - kl)).sigmoid()


# -- pairs without a reference -------------------------------------------------------------------


def log_odds(mean_logprob: Tensor) -> Tensor:
    """log p / (1 - p) for p the geometric mean of an answer's token probabilities."""
    # 1 - p is computed as -expm1(log p), which is exact for p near 1; there it is held above 0.
    held = mean_logprob.clamp(max=-1e-7)
    return held - (-held.expm1()).log()


def orpo(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """-log σ of the log odds ratio, from mean log-probabilities (arXiv:2403.07691)."""
    return -logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def alpha_reward(logprob: Tensor, alpha: float) -> Tensor:
    """(1 - p^-α) / α, which is log p at α = 0 (arXiv:2501.03884)."""
    return logprob if alpha == 0 else -(-alpha * logprob).expm1() / alpha


def cpo(delta: Tensor, kind: str, beta: float, epsilon: float = 0.0, gamma: float = 0.0) -> Tensor:
    """CPO (arXiv:2401.08417) and SimPO (arXiv:2405.14734) on a difference of rewards."""
    if kind == "hinge":
        return (1 - beta * delta).relu()
    if kind == "ipo":
        return (delta - 1 / (2 * beta)) ** 2
    return smoothed(beta * delta - (gamma if kind == "simpo" else 0.0), epsilon)


# -- rewards -------------------------------------------------------------------------------------


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log σ(reward of the chosen - of the rejected - margin)."""
    return -logsigmoid(chosen - rejected - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(sum of both rewards)², which keeps them about zero (arXiv:2312.09244)."""
    return (chosen + rejected) ** 2


def weights(logprobs_minus_collision: Tensor, tokens: Tensor) -> Tensor:
    """WPO's weight of an answer (arXiv:2406.11827, eq. 2): exp of the mean over its tokens of
    log p(token) - log Σ p²; both arguments per answer [A]."""
    return torch.exp(logprobs_minus_collision / tokens)
