"""MonteCLoRA (arXiv:2411.04358): in training A is the mean of several draws around it, whose spread
and weights are learned."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import ops
from topwork.peft.methods._lora_options import MontecloraConfig
from topwork.peft.methods.lora import Lora

LEAST = 1e-6
"""Below it the counts of the Dirichlet distribution and their variance do not go."""
LEAST_VARIANCE = 1e-3


class Sampler(nn.Module):
    """What is learned of the draws, under its names in files: the log of the spread [r], and the
    log of the Dirichlet counts [n] of the draws' weights. The buffers show the last draw."""

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, r: int, draws: int, device: torch.device) -> None:
        super().__init__()
        self.std_prior = nn.Parameter(torch.rand(r, device=device))
        self.expert_weights_prior = nn.Parameter(torch.rand(draws, device=device))
        self.register_buffer("gaussian_var_prior", torch.eye(r, device=device))
        self.register_buffer("expert_weights", torch.full((draws,), 1 / draws, device=device))


class MonteClora(Lora):
    """A + c · Σ_n w_n z_n √v with z_n [r, in] normal; v = σ² χ²(r) [r], w = softmax of a normal."""

    KINDS = ("linear",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.last: tuple[Tensor, Tensor] | None = None
        """What the last pass drew for the variance [r] and for the weights [n]."""

    @property
    def options(self) -> MontecloraConfig:
        assert self.config.monteclora_config is not None
        return self.config.monteclora_config

    @property
    def sampler(self) -> Sampler:
        return self.layer.lora_monteclora_sampler[self.name]  # type: ignore[return-value, index]

    def create(self) -> dict[str, Tensor | nn.Module]:
        sampler = Sampler(self.r, self.options.num_samples, self.layer.device)
        return super().create() | {"lora_monteclora_sampler": sampler}

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A, in training with the draws, and B; merging sees A itself."""
        a, b = self.matrices()
        return (a + self.noise(*self.draw()) if self.layer.training else a), b

    def term(self) -> ops.LoraTerm:
        return ops.LoraTerm(*self._matrices(), self.scale, self.dropout)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (m.to(y.dtype) for m in self._matrices())
        x = F.dropout(x, self.dropout, self.layer.training)
        return y + F.linear(F.linear(x, a), b) * self.scale

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """z [n, in, r] and one [n], normal; χ²(r) [r], the diagonal of a Wishart matrix."""
        n, r, like = self.options.num_samples, self.r, self.sampler.std_prior
        z = torch.randn(n, self.site.inputs, r, device=like.device)
        chi = torch.randn(r, r, device=like.device).square().sum(1)
        return z, chi, torch.randn(n, device=like.device)

    def noise(self, z: Tensor, chi: Tensor, normal: Tensor) -> Tensor:
        """What is added to A [r, in]."""
        variance, weights = self.spread(chi), self.weights(normal)
        self.last = (chi, normal)
        with torch.no_grad():
            self.sampler.gaussian_var_prior.copy_(torch.diag(variance))
            self.sampler.expert_weights.copy_(weights)
        mean = torch.einsum("n,nir->ri", weights, z)
        return self.options.sample_scaler * variance.sqrt()[:, None] * mean

    def spread(self, chi: Tensor) -> Tensor:
        """The variance [r] of the draws."""
        return ((2 * self.sampler.std_prior).exp() * chi).clamp(min=LEAST_VARIANCE)

    def weights(self, normal: Tensor) -> Tensor:
        """How much each draw counts [n]: a Dirichlet distribution as the softmax of a normal one
        (Laplace's approximation)."""
        counts, n = self.sampler.expert_weights_prior.exp().clamp(min=LEAST), len(normal)
        variance = (1 - 2 / n) / counts + (1 / counts).sum() / n**2
        mean = counts.log() - counts.log().mean()
        return ((variance.clamp(min=LEAST) + LEAST).sqrt() * normal + mean).softmax(0)

    @classmethod
    def penalty(cls, config: Any, grafts: list[Any]) -> Tensor | None:
        found = [graft.divergence() for graft in grafts if graft.last is not None]
        return torch.stack(found).mean() if found else None

    def divergence(self) -> Tensor:
        """How far the learned distributions are from the priors, as the peer counts it."""
        assert self.last is not None
        (chi, normal), options, r = self.last, self.options, self.r
        counts, log_std = self.sampler.expert_weights_prior.exp(), self.sampler.std_prior
        variance = self.spread(chi)
        prior = torch.full_like(counts, options.dirichlet_prior)
        total = counts.sum()
        of_weights = (
            total.lgamma() - prior.sum().lgamma() + (counts.lgamma() - prior.lgamma()).sum()
            + ((counts - prior) * (counts.digamma() - total.digamma())).sum()
        )  # fmt: skip
        of_variance = 0.5 * r * ((2 * log_std).exp() - 2 * log_std - 1).sum()
        of_draws = 0.5 * len(counts) * (variance - variance.log() - 1).sum()
        divergence = options.kl_loss_weight * (of_weights + of_variance + of_draws)
        if options.use_entropy:
            divergence = divergence + self.weights(normal).square().sum()
        return divergence
