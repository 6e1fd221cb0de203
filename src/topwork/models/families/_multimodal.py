"""What the families of texts with images read alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from topwork.errors import ConfigError
from topwork.models import families
from topwork.models.config import Config, ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.multimodal import ImageTextModel, ImageTextSpec
from topwork.models.vision import VisionSpec
from topwork.weights import Rename, Table

# What a nested configuration leaves out, by its model_type.
USUAL: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "qwen2": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 151936,
    },
    "gemma": {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "vocab_size": 256000,
    },
    "gemma2": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000,
    },
    "gemma3_text": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
INERT = ("use_cache", "initializer_factor")


def text_part(
    read: ConfigReader, kinds: tuple[str, ...], key: str = "text_config"
) -> tuple[ConfigReader, DecoderSpec]:
    """The nested decoder; ConfigError unless it is one of `kinds` (none given: any decoder)."""
    values = read(key, {})
    kind = values.get("model_type") or (kinds[0] if kinds else "llama")
    home = families.family(kind) if kind in families.NAMES else None
    if home is None or not hasattr(home, "spec") or (kinds and kind not in kinds):
        known = ", ".join(kinds) or "a decoder's"
        raise ConfigError(f"{key} of model_type {kind!r}: {read.model_type} reads {known}")
    part = read.part(key, model_type=kind, usual=USUAL.get(kind, {}))
    part.ignore("num_image_tokens")
    if part("use_bidirectional_attention") is not None and hasattr(home, "text_spec"):
        return part, home.text_spec(part)
    return part, home.spec(part)


def vision_part(
    read: ConfigReader, kinds: tuple[str, ...], key: str = "vision_config"
) -> tuple[ConfigReader, VisionSpec]:
    """The nested vision tower, one of `kinds`."""
    kind = read(key, {}).get("model_type") or kinds[0]
    if kind not in kinds:
        raise ConfigError(
            f"{key} of model_type {kind!r}: {read.model_type} reads {', '.join(kinds)}"
        )
    part = read.part(key, model_type=kind)
    part.ignore("num_image_tokens", "projector_hidden_act", "vocab_size", "projection_dim")
    return part, families.family(kind).tower(part)


def tying(decoder: DecoderSpec, tied: bool) -> DecoderSpec:
    return replace(decoder, tied=tied)


# Layouts of LLaVA's kind: that of the Hub is the memory's.
NEWER = (
    Rename("^model.language_model", "^language_model.model"),
    Rename("^lm_head", "^language_model.lm_head"),
    Rename("^model.vision_tower", "^vision_tower"),
    Rename("^model.multi_modal_projector", "^multi_modal_projector"),
)
BARE_TOWER = tuple(
    Rename(f"^vision_tower.{name}", f"^vision_tower.vision_model.{name}")
    for name in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")
)
BUFFERS = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")


def table(decoder: DecoderSpec, old: tuple[Rename, ...]) -> Table:
    """The decoder's own rules, and further layouts that are read."""
    return Table(decoder.table.rules, old, BUFFERS)


def image_text_models(spec: Callable[[ConfigReader], ImageTextSpec]) -> dict[str, Any]:
    """The models of a family."""

    def made(config: Config, read: ConfigReader) -> ImageTextModel:
        return ImageTextModel(config, spec(read))

    return {"image-text-to-text": made}
