"""What a call of a tokenizer's `from_pretrained` asks for, and what its files mean."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from tokenizers import Regex, decoders
from tokenizers import Tokenizer as Core

from topwork import hub
from topwork.errors import ConfigError, nearest

T = TypeVar("T")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token",
           "mask_token")  # fmt: skip
# Tokenizers that do more than their files say, by the class that the files name.
KINDS = {
    "Wav2Vec2CTC": ("topwork.text.ctc", "CtcTokenizer"),
    "Whisper": ("topwork.text.whisper", "WhisperTokenizer"),
}
# What a call of from_pretrained may set, and what it may say without effect.
CHANGED = ("padding_side", "truncation_side", "model_max_length", "chat_template",
           "add_prefix_space")  # fmt: skip
IDLE = frozenset({"use_fast", "trust_remote_code", "legacy", "from_slow", "config"})


def told_apart(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `from_pretrained`: where to look, and attributes to set.

    ConfigError for others.
    """
    where = {k: v for k, v in given.items() if k in hub.PLACES}
    changes = {k: v for k, v in given.items() if k in (*SPECIAL, *CHANGED)}
    for name in given.keys() - where.keys() - changes.keys() - IDLE:
        known = (*hub.PLACES, *SPECIAL, *CHANGED)
        raise ConfigError(f"from_pretrained has no option {name!r}{nearest(name, known)}")
    return where, changes


def kind_of(cls: type[T], config: Mapping[str, Any]) -> type[T]:
    """`cls`, or what the files ask for in its place."""
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    if cls.__name__ != "Tokenizer" or named not in KINDS:
        return cls
    module, name = KINDS[named]
    return getattr(importlib.import_module(module), name)


def with_word_ends(core: Core) -> Core:
    """`core` as it decodes with its mark of a word's end (CLIP's) read as a blank."""
    mark = getattr(core.model, "end_of_word_suffix", None)
    if mark and isinstance(core.decoder, decoders.ByteLevel):
        blanks = [decoders.Replace(mark, " "), decoders.Replace(Regex(r"^\s+|\s+$"), "")]
        core.decoder = decoders.Sequence([core.decoder, *blanks])
    return core


def plain_template(given: Any) -> str | None:
    """The template itself, or the one named "default" of a list."""
    if isinstance(given, list):
        return next((t["template"] for t in given if t.get("name") == "default"), None)
    return given
