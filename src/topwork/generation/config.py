"""`GenerationConfig`: what a call of `generate` may set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from topwork.errors import ConfigError, nearest

# Of transformers' files: without effect on which tokens come out, or not at these values.
INERT = frozenset(
    {"_from_model_config", "transformers_version", "use_cache", "cache_implementation"}
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1.0,),
    "num_beams": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
}


@dataclass(kw_only=True)
class GenerationConfig:
    """How to choose tokens and when to stop. Names as in `generation_config.json`."""

    max_new_tokens: int | None = None
    """Tokens after the prompt; 20 when neither this nor `max_length` is given."""
    max_length: int | None = None
    """Prompt and new tokens together; `max_new_tokens` comes first."""
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are there already less likely (arXiv:1909.05858)."""
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    num_return_sequences: int = 1
    seed: int | None = None
    """Seed of the draws; None draws from torch's default generator."""

    def __post_init__(self) -> None:
        limits: list[tuple[str, bool, str]] = [
            ("max_new_tokens", (self.max_new_tokens or 0) >= 0, "at least 0"),
            ("max_length", self.max_length is None or self.max_length > 0, "positive"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            ("temperature", self.temperature > 0, "positive; for greedy use do_sample=False"),
            ("top_k", self.top_k >= 0, "at least 0 (0: off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("num_return_sequences", self.num_return_sequences > 0, "positive"),
        ]
        for name, fits, rule in limits:
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)} must be {rule}")
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ConfigError("num_return_sequences > 1 needs do_sample=True: greedy gives one")

    @property
    def stops(self) -> list[int]:
        """The ids that end a row."""
        ids = self.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @classmethod
    def of(cls, file: dict[str, Any], call: dict[str, Any]) -> Self:
        """From a model's file and the call's own options, which come first."""
        known = {f.name for f in fields(cls)}
        for name in call:
            if name not in known:
                raise ConfigError(f"generate() has no option {name!r}{nearest(name, known)}")
        for name, value in file.items():
            neutral = value is None or value is False or value in NEUTRAL.get(name, ())
            if name not in known | INERT and not neutral:
                raise ConfigError(f"generation_config.json sets {name}={value!r}: not supported")
        given = {k: v for k, v in file.items() if k in known and v is not None}
        if "max_new_tokens" in call or "max_length" in call:
            given = {k: v for k, v in given.items() if k not in ("max_new_tokens", "max_length")}
        return cls(**{**given, **call})
