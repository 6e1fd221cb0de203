"""LoRA's options that have options of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

from topwork.errors import ConfigError
from topwork.peft.config import at_least, one_of


@dataclass
class EvaConfig:
    """EVA (arXiv:2410.07170): A from the principal directions of the layer's inputs, ranks given
    to the layers whose directions explain most."""

    rho: float = 2.0
    """The most that a layer's rank may grow to, over r; 1: no redistribution."""
    tau: float = 0.99
    """The cosine between a direction and its last estimate at which it has converged."""
    use_label_mask: bool = True
    """Count only tokens with a label."""
    label_mask_value: int = -100
    whiten: bool = False
    """Divide each direction by the root of its singular value."""
    adjust_scaling_factors: bool = True
    """Let alpha grow with the rank, so that the scale stays."""

    def __post_init__(self) -> None:
        at_least("rho", self.rho, 1)
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau} must be in [0, 1]")


@dataclass
class CordaConfig:
    """CorDA (arXiv:2406.05223): principal directions of the weight as the data sees it."""

    cache_file: str | None = None
    """A .safetensors file of the directions: read if it is there, else written."""
    covariance_file: str | None = None
    """The same for the inputs' covariances."""
    corda_method: str = "ipm"
    """"ipm": adapt the directions that matter most to the data; "kpm": those that matter least,
    which keeps what the model knows of it."""
    verbose: bool = False
    """No effect."""
    use_float16_for_covariance: bool = False
    """Sum the covariances in float16: half the memory, less exact."""
    prune_temporary_fields: bool = True
    """No effect: nothing is left on the modules."""

    def __post_init__(self) -> None:
        one_of("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """LoRA-GA (arXiv:2407.05000): A and B from the singular vectors of the full gradient."""

    direction: str = "ArB2r"
    """Which of the first 2r vectors go to A and to B: "ArBr" by turns, "A2rBr" the second r to A,
    "ArB2r" the first r to A, "random" the same r to both."""
    scale: str = "stable"
    """"stable" (with `stable_gamma`), "weight_svd", "gd_scale", "unit"."""
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        one_of("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        one_of("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))


@dataclass
class LoftQConfig:
    """LoftQ (arXiv:2310.08659): A and B take up what rounding the weight loses."""

    loftq_bits: int = 4
    """4: NF4; 8: int8 by row."""
    loftq_iter: int = 1
    """Turns between rounding and decomposing."""

    def __post_init__(self) -> None:
        one_of("loftq_bits", self.loftq_bits, (4, 8))
        at_least("loftq_iter", self.loftq_iter, 1)


@dataclass
class VeloraConfig:
    """VeLoRA (arXiv:2405.17991): of A's input only its projections on one vector are kept for the
    backward pass."""

    num_groups: int = 64
    """Into how many pieces the input is cut, each projected alone."""
    scale: float = 1.0
    """Of the input as it is put together again."""
    init_type: str = "batch_average"
    """The vector: the mean piece of each batch, of the first ("batch_average_once"), "random"."""

    def __post_init__(self) -> None:
        at_least("num_groups", self.num_groups, 1)
        if self.scale <= 0:
            raise ConfigError(f"velora_config: scale={self.scale} must be positive")
        one_of("init_type", self.init_type, ("batch_average", "batch_average_once", "random"))


@dataclass
class KasaConfig:
    """KaSA (arXiv:2412.06071): the weight without its r least directions, plus s · B diag(d) A."""

    beta: float = 1e-4
    """How much ‖d‖² counts in the loss."""
    gamma: float = 1e-3
    """How much A's and B's distance from orthogonal counts in the loss."""

    def __post_init__(self) -> None:
        at_least("beta", self.beta, 0)
        at_least("gamma", self.gamma, 0)


@dataclass
class MontecloraConfig:
    """MonteCLoRA (arXiv:2411.04358): in training A is a weighted mean of draws around it."""

    num_samples: int = 8
    """How many draws."""
    use_entropy: bool = False
    """Add the sum of the squared weights to the loss, which keeps them even."""
    dirichlet_prior: float = 0.1
    """The counts of the weights' prior: the larger, the more even."""
    sample_scaler: float = 1e-4
    """By what the draws count."""
    kl_loss_weight: float = 1e-5
    """How much the distance from the priors counts in the loss."""
    buffer_size: int = 150
    """No effect: nothing is drawn ahead."""

    def __post_init__(self) -> None:
        at_least("num_samples", self.num_samples, 1)
        at_least("buffer_size", self.buffer_size, 1)
        if self.dirichlet_prior <= 0:
            raise ConfigError(f"dirichlet_prior={self.dirichlet_prior} must be positive")


@dataclass
class BdLoraConfig:
    """BD-LoRA: A or B block-diagonal, so that serving in shards needs no exchange."""

    target_modules_bd_a: list[str] | None = None
    """Parts of the names of modules whose A is block-diagonal."""
    target_modules_bd_b: list[str] | None = None
    """The same for B."""
    nblocks: int = 1
    match_strict: bool = True
    """Refuse a target that is in neither list."""

    def __post_init__(self) -> None:
        at_least("nblocks", self.nblocks, 1)
        both = set(self.target_modules_bd_a or []) & set(self.target_modules_bd_b or [])
        if both:
            raise ConfigError(f"use_bdlora: {sorted(both)} cannot have both of A and B in blocks")


@dataclass
class ArrowConfig:
    """Arrow (arXiv:2405.11157): each token goes through the adapters whose first direction it
    lies nearest to; with GenKnowSub, less what general adapters know."""

    top_k: int = 3
    """How many adapters a token goes through."""
    router_temperature: float = 1.0
    use_gks: bool = False
    """Take the mean of the general adapters out of each."""
    rng_seed: int | None = None
    """No effect: nothing is drawn."""
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        at_least("top_k", self.top_k, 1)
        if self.router_temperature <= 0:
            raise ConfigError(f"router_temperature={self.router_temperature} must be positive")
