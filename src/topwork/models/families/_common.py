"""What the Llama-shaped families read alike."""

from __future__ import annotations

from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec, LayerSpec
from topwork.nn.layers import AttentionSpec, MlpSpec
from topwork.nn.rotary import RotarySpec


def read_rotary(
    read: ConfigReader, head_dim: int, *, theta: float = 10000.0, share: float | None = None
) -> RotarySpec:
    """Rotary options of both config generations: rope_theta + rope_scaling, or rope_parameters.

    `share`: the default of partial_rotary_factor, None where the family has no such option.
    """
    context = read("max_position_embeddings", 2048)
    theta = read("rope_theta", theta)
    options: dict[str, Any] = dict(read("rope_scaling", {})) or {}
    options = {**options, **read("rope_parameters", {})}
    kind = options.pop("rope_type", options.pop("type", "default"))
    options.pop("type", None)
    theta = options.pop("rope_theta", theta)
    chosen_share = options.pop("partial_rotary_factor", None)
    if share is None:
        if chosen_share not in (1.0, None):
            raise ConfigError("partial_rotary_factor is not part of this family")
    else:
        named = read("partial_rotary_factor", share)
        head_dim = int(head_dim * (named if chosen_share is None else chosen_share))
    original = options.pop("original_max_position_embeddings", None) or context
    original = read("original_max_position_embeddings", original)
    factor = options.pop("factor", None)
    factor = context / original if factor is None else factor
    used = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": (
            "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        ),
    }.get(kind, ())  # fmt: skip
    chosen = {k: options.pop(k) for k in list(options) if k in used}
    if options:
        raise ConfigError(f"rope options {sorted(options)} have no meaning for rope_type={kind!r}")
    return RotarySpec(
        head_dim, float(theta), context, kind, float(factor), original,
        **{k: v for k, v in chosen.items() if v is not None},
    )  # fmt: skip


def llama_like(
    read: ConfigReader,
    *,
    windows: list[int | None] | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
) -> DecoderSpec:
    """A spec from the keys that all of them share; the differences come as arguments."""
    hidden, heads = read.need("hidden_size"), read.need("num_attention_heads")
    size = read("head_dim", head_dim or hidden // heads)
    rotary = read_rotary(read, size)
    mlp = MlpSpec(read.need("intermediate_size"), read("hidden_act", "silu"), mlp_bias)
    count = read.need("num_hidden_layers")
    layers = tuple(
        LayerSpec(
            AttentionSpec(
                heads,
                read("num_key_value_heads", heads),
                size,
                rotary,
                qkv_bias,
                out_bias,
                qk_norm,
                windows[i] if windows else None,
            ),
            mlp,
        )
        for i in range(count)
    )
    return DecoderSpec(
        read.need("vocab_size"),
        hidden,
        read("max_position_embeddings", 2048),
        read("rms_norm_eps", 1e-6),
        layers,
        bool(read("tie_word_embeddings", False)),
    )


def windows_by_layer(read: ConfigReader) -> list[int | None]:
    """Qwen's windows: `layer_types`, or the layers from `max_window_layers` on."""
    count, used = read.need("num_hidden_layers"), read("use_sliding_window", False)
    window = read("sliding_window", 4096)
    window = window if used else None
    first = read("max_window_layers", 28)
    kinds = read("layer_types")
    if kinds is None:
        return [window if i >= first else None for i in range(count)]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != count:
        raise ConfigError(f"layer_types={kinds!r} does not describe {count} layers")
    return [window if kind == "sliding_attention" else None for kind in kinds]
