"""`GenerationConfig`: what a call of `generate` may set."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar, dataclass_transform

from topwork import hub
from topwork.errors import ConfigError, nearest

T = TypeVar("T")
FILE = "generation_config.json"
# Of transformers' files: without effect on which tokens come out.
INERT = frozenset(
    {
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "compile_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "synced_gpus",
        "token_type_ids",
        "use_model_defaults",
        "max_cache_len",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
    }
)
# Of transformers too, with the value that changes nothing and what to do instead.
REFUSED: dict[str, tuple[Any, str]] = {
    "num_beam_groups": (1, "diverse beams are not offered; use num_beams or do_sample"),
    "diversity_penalty": (0.0, "diverse beams are not offered; use num_beams or do_sample"),
    "encoder_repetition_penalty": (1.0, "it needs an encoder's prompt; use repetition_penalty"),
    "encoder_no_repeat_ngram_size": (0, "it needs an encoder's prompt; use no_repeat_ngram_size"),
    "force_words_ids": (None, "pass a constraint from topwork.generation.constraints"),
    "constraints": (None, "pass a constraint from topwork.generation.constraints"),
    "token_healing": (False, "it is not offered; end the prompt before the last word's space"),
    "watermarking_config": (None, "it is not offered; pass a function as logits_processor"),
    "dola_layers": (None, "it is not offered"),
    "assistant_early_exit": (None, "pass assistant_model or prompt_lookup_num_tokens"),
    "assistant_ensemble_weight": (
        None,
        "it is not offered; guesses are checked by the model alone",
    ),
    "speculation_type": (None, "pass assistant_model or prompt_lookup_num_tokens"),
    "use_mtp": (False, "it is not offered; pass assistant_model or prompt_lookup_num_tokens"),
    "custom_generate": (None, "pass logits_processor or stopping_criteria"),
    "cache_config": (None, "caches take no options here; choose one by cache_implementation"),
    "continuous_batching_config": (None, "use topwork.generation.Engine and its arguments"),
    "output_attentions": (False, "fused attention forms no weights; call the model instead"),
    "output_hidden_states": (False, "call the model with output_hidden_states=True instead"),
}
CACHES = ("dynamic", "static", "sliding_window", "quantized")
# Ways to place a cache that change no number: the usual one serves.
PLACED = ("dynamic_full", "hybrid", "hybrid_chunked", "offloaded", "offloaded_static", "paged")
SCHEDULES = ("constant", "heuristic")


def asked_for(cls: type, call: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that are fields; ConfigError for what is not known or not done."""
    known = {f.name for f in fields(cls)}
    for name, value in call.items():
        if name in REFUSED and value is not None and value != REFUSED[name][0]:
            raise ConfigError(f"{name}={value!r} is not supported: {REFUSED[name][1]}")
        if name not in known | INERT | set(REFUSED):
            raise ConfigError(f"generate() has no option {name!r}{nearest(name, known)}")
    # None in a call switches off what is None by default; top_k=None is an old way to say 0.
    defaults = {f.name: f.default for f in fields(cls)} | {"top_k": 0, "top_p": 1.0}
    return {k: defaults[k] if v is None else v for k, v in call.items() if k in known}


@dataclass_transform(kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """`cls` as a dataclass of keywords, made of what a call of `generate` may name."""
    made = dataclass(kw_only=True)(cls)
    plain: Callable[..., None] = made.__init__

    @functools.wraps(plain)
    def init(self: Any, **given: Any) -> None:
        plain(self, **asked_for(made, given))

    made.__init__ = init  # type: ignore[method-assign]
    return made


@options
class GenerationConfig:
    """How to choose tokens and when to stop. Names as in `generation_config.json`."""

    # How long.
    max_new_tokens: int | None = None
    """Tokens after the prompt; 20 when neither this nor `max_length` is given."""
    max_length: int | None = None
    """Prompt and new tokens together; `max_new_tokens` comes first."""
    min_new_tokens: int = 0
    min_length: int = 0
    max_time: float | None = None
    """Seconds after which no further token is begun."""
    stop_strings: str | list[str] | None = None
    """Text that ends a row once it stands in what was made; needs `tokenizer=` in the call."""
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None

    # How to draw.
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    seed: int | None = None
    """Seed of the draws; None draws from torch's default generator."""

    # What to make likelier or to forbid.
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are there already less likely (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from each token that was made; as OpenAI's interface has it."""
    frequency_penalty: float = 0.0
    """Subtracted from each token that was made, for each time."""
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | list[Any] | None = None
    """{(id, …): bias} or [[[id, …], bias], …]: added to the last id after the others."""
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(start, factor): from `start` new tokens on the end becomes likelier by this factor."""
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    guidance_scale: float | None = None
    """Above 1 leads away from the negative prompt (arXiv:2306.17806)."""

    # Searching.
    num_beams: int = 1
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length^length_penalty."""
    early_stopping: bool | str = False
    """True: stop at num_beams finished ones; False: when a better one is unlikely; "never"."""
    penalty_alpha: float | None = None
    """Above 0, with top_k > 1: contrastive search (arXiv:2202.06417)."""
    num_return_sequences: int = 1

    # Guessing ahead.
    prompt_lookup_num_tokens: int | None = None
    """Guess so many tokens by finding the last ones earlier in the text."""
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"

    # The cache and what comes back.
    cache_implementation: str | None = None
    """One of "dynamic", "static", "sliding_window", "quantized"; None: "dynamic"."""
    prefill_chunk_size: int | None = None
    """Read the prompt in pieces of so many tokens, which bounds the memory it takes."""
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False

    def __post_init__(self) -> None:
        for name, fits, rule in self._rules():
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {rule}")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_beams == 1:
            raise ConfigError("num_return_sequences > 1 needs do_sample=True: greedy gives one")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences={self.num_return_sequences} is more than "
                f"num_beams={self.num_beams}"
            )
        if self.contrastive and (self.num_beams > 1 or self.do_sample):
            raise ConfigError("penalty_alpha goes with neither num_beams nor do_sample")
        _ = self.biases

    def _rules(self) -> list[tuple[str, bool, str]]:
        def count(name: str) -> tuple[str, bool, str]:
            value = getattr(self, name)
            return name, isinstance(value, int) and value >= 0, "a whole number, at least 0"

        def share(name: str, off: float | None) -> tuple[str, bool, str]:
            value = getattr(self, name)
            return name, value == off or 0 < value <= 1, "in (0, 1]"

        early, penalty = self.early_stopping, self.exponential_decay_length_penalty
        return [
            *map(count, ("min_new_tokens", "min_length", "no_repeat_ngram_size", "top_k")),
            ("max_new_tokens", (self.max_new_tokens or 0) >= 0, "at least 0"),
            ("max_length", self.max_length is None or self.max_length > 0, "positive"),
            ("max_time", self.max_time is None or self.max_time > 0, "positive"),
            ("temperature", self.temperature > 0, "positive; for greedy use do_sample=False"),
            share("top_p", None),
            share("top_h", None),
            share("typical_p", 1.0),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("epsilon_cutoff", 0 <= self.epsilon_cutoff < 1, "in [0, 1)"),
            ("eta_cutoff", 0 <= self.eta_cutoff < 1, "in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("guidance_scale", (self.guidance_scale or 1) > 0, "positive"),
            ("penalty_alpha", 0 <= (self.penalty_alpha or 0) <= 1, "in [0, 1]"),
            ("num_beams", self.num_beams > 0, "positive"),
            ("num_return_sequences", self.num_return_sequences > 0, "positive"),
            ("early_stopping", early in (True, False, "never"), 'True, False or "never"'),
            ("prompt_lookup_num_tokens", (self.prompt_lookup_num_tokens or 1) > 0, "positive"),
            ("max_matching_ngram_size", self.max_matching_ngram_size > 0, "positive"),
            ("num_assistant_tokens", self.num_assistant_tokens > 0, "positive"),
            ("prefill_chunk_size", (self.prefill_chunk_size or 1) > 0, "positive"),
            ("exponential_decay_length_penalty", penalty is None or len(penalty) == 2, "a pair"),
            (
                "bad_words_ids",
                self.bad_words_ids is None or all(self.bad_words_ids),
                "lists of ids, none of them empty",
            ),
            (
                "num_assistant_tokens_schedule",
                self.num_assistant_tokens_schedule in SCHEDULES,
                f"one of {', '.join(SCHEDULES)}",
            ),
            (
                "cache_implementation",
                self.cache_implementation in (None, *CACHES, *PLACED),
                f"one of {', '.join(CACHES)}",
            ),
        ]

    @property
    def stops(self) -> list[int]:
        """The ids that end a row."""
        return _as_list(self.eos_token_id)

    @property
    def forced_ends(self) -> list[int]:
        return _as_list(self.forced_eos_token_id)

    @property
    def filler(self) -> int:
        """What stands after a row's end."""
        return self.pad_token_id if self.pad_token_id is not None else (self.stops or [0])[0]

    @property
    def contrastive(self) -> bool:
        return bool(self.penalty_alpha) and self.top_k > 1

    @property
    def biases(self) -> list[tuple[tuple[int, ...], float]]:
        """`sequence_bias` as pairs of ids and bias."""
        given = self.sequence_bias or {}
        pairs = given.items() if isinstance(given, Mapping) else given
        try:
            found = [(tuple(int(i) for i in ids), float(bias)) for ids, bias in pairs]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"sequence_bias={given!r} is no {{(id, …): bias}}") from error
        if not all(ids for ids, _ in found):
            raise ConfigError("sequence_bias has an entry without ids")
        return found

    # -- files and mappings ----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What is not at its default."""
        plain = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in vars(self).items() if v != plain[k]}

    def update(self, **call: Any) -> None:
        """Take up the options of a call."""
        vars(self).update(vars(type(self)(**{**vars(self), **call})))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write generation_config.json into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **given: Any) -> Self:
        """What generation_config.json of a folder or a Hub id says; `given` may hold options of a
        call besides where to look."""
        where = {k: given.pop(k) for k in hub.PLACES if k in given}
        return cls.of(hub.resolve(name_or_path, want=("config",), **where).json(FILE), given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls.of(values, {})

    @classmethod
    def from_model_config(cls, config: Any) -> Self:
        """What config.json says of generation."""
        known = {f.name for f in fields(cls)}
        return cls.of({k: v for k, v in config.to_dict().items() if k in known}, {})

    @classmethod
    def of(cls, file: Mapping[str, Any], call: Mapping[str, Any]) -> Self:
        """From a model's file and the call's own options, which come first."""
        known = {f.name for f in fields(cls)}
        chosen = asked_for(cls, call)
        for name, value in file.items():
            neutral = value is None or value is False
            neutral = neutral or (name in REFUSED and value == REFUSED[name][0])
            if name not in known | INERT and not neutral:
                reason = f": {REFUSED[name][1]}" if name in REFUSED else ""
                raise ConfigError(
                    f"generation_config.json sets {name}={value!r}: not supported{reason}"
                )
        given = {k: v for k, v in file.items() if k in known and v is not None}
        if "max_new_tokens" in call or "max_length" in call:
            given = {k: v for k, v in given.items() if k not in ("max_new_tokens", "max_length")}
        return cls(**{**given, **chosen})


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else [int(i) for i in ids]
