"""What the Llama-shaped families read alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec, FeedForward, HeadSpec, LayerSpec
from topwork.nn.layers import AttentionSpec, MlpSpec, QkNorm
from topwork.nn.norms import NormSpec
from topwork.nn.rotary import RotarySpec

# Which options each kind of rotary scaling takes, beside rope_theta and its kind.
SCALING_OPTIONS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": (
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    ),
    "longrope": ("attention_factor", "short_factor", "long_factor"),
}  # fmt: skip


def read_rotary(
    read: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10000.0,
    share: float | None = None,
    aliases: dict[str, str] | None = None,
    **fixed: Any,
) -> RotarySpec:
    """Rotary options of both config generations: rope_theta + rope_scaling, or rope_parameters.

    `theta` is the default. `share`: the default of partial_rotary_factor, None where the family has
    no such option. `aliases`: other names of a scaling. `fixed`: fields that the family sets.
    """
    options = {**(read("rope_scaling", {}) or {}), **read("rope_parameters", {})}
    options.setdefault("rope_theta", read("rope_theta", theta))
    if share is not None:
        options.setdefault("partial_rotary_factor", read("partial_rotary_factor", share))
    return rotary_of(read, options, head_dim, share is not None, aliases or {}, fixed)


def read_rotaries(
    read: ConfigReader, head_dim: int, *, theta: float, local_theta: float, **fixed: Any
) -> dict[str, RotarySpec]:
    """Rotary options by layer type. Old files scale the full layers alone, and name the base of the
    sliding ones rope_local_base_freq."""
    nested = read("rope_parameters", {})
    if nested and not {"full_attention", "sliding_attention"} & set(nested):
        nested = {"full_attention": nested}
    full = {**(read("rope_scaling", {}) or {}), **(nested.get("full_attention") or {})}
    sliding = dict(nested.get("sliding_attention") or {})
    full.setdefault("rope_theta", read("rope_theta", theta))
    sliding.setdefault("rope_theta", read("rope_local_base_freq", read("rope_theta", local_theta)))
    return {
        "full_attention": rotary_of(read, full, head_dim, False, {}, fixed),
        "sliding_attention": rotary_of(read, sliding, head_dim, False, {}, fixed),
    }


def rotary_of(
    read: ConfigReader,
    options: dict[str, Any],
    head_dim: int,
    partial: bool,
    aliases: dict[str, str],
    fixed: dict[str, Any],
) -> RotarySpec:
    """One rotary spec from its options; ConfigError for those that mean nothing to its kind."""
    context = read("max_position_embeddings", 2048)
    options = {key: value for key, value in options.items() if value is not None}
    kinds = (options.pop("rope_type", None), options.pop("type", None), "default")
    kind = next(name for name in kinds if name)
    kind = aliases.get(kind, kind)
    theta, share = options.pop("rope_theta"), options.pop("partial_rotary_factor", 1.0)
    if kind == "proportional":
        fixed = {**fixed, "share": share}
    elif partial:
        head_dim = int(head_dim * share)
    elif share != 1:
        raise ConfigError(f"partial_rotary_factor={share} is not part of {read.model_type!r}")
    original = options.pop("original_max_position_embeddings", None) or context
    original = read("original_max_position_embeddings", original)
    factor = options.pop("factor", 1.0 if kind == "proportional" else context / original)
    chosen = {k: options.pop(k) for k in SCALING_OPTIONS.get(kind, ()) if k in options}
    if options:
        raise ConfigError(f"rope options {sorted(options)} have no meaning for rope_type={kind!r}")
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    return RotarySpec(
        head_dim, float(theta), context, kind, float(factor), original, **{**chosen, **fixed}
    )


def head_size(read: ConfigReader, default: int | None = None) -> int:
    """head_dim, else `default`, else the hidden size shared out to the heads."""
    return read("head_dim", default or read.need("hidden_size") // read.need("num_attention_heads"))


def llama_like(
    read: ConfigReader,
    *,
    norm: NormSpec | None = None,
    head_dim: int | None = None,
    rotary: RotarySpec | Sequence[RotarySpec | None] | None = None,
    windows: Sequence[int | None] | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: QkNorm | None = None,
    mlp: FeedForward | Sequence[FeedForward] | None = None,
    attention: dict[str, Any] | None = None,
    layer: dict[str, Any] | None = None,
    tied: bool = False,
    **whole: Any,
) -> DecoderSpec:
    """A spec from the keys that all of them share; the differences come as arguments.

    `rotary` and `mlp` may differ by layer. `attention`, `layer` and `whole` are further fields of
    `AttentionSpec`, `LayerSpec` and `DecoderSpec`; `tied` is the default of tie_word_embeddings.
    """
    hidden, heads = read.need("hidden_size"), read.need("num_attention_heads")
    count, size = read.need("num_hidden_layers"), head_size(read, head_dim)
    rotary = read_rotary(read, size) if rotary is None else rotary
    rotaries = [rotary] * count if isinstance(rotary, RotarySpec) else list(rotary)
    mlp = gated(read) if mlp is None else mlp
    mlps = list(mlp) if isinstance(mlp, Sequence) else [mlp] * count
    layers = tuple(
        LayerSpec(
            AttentionSpec(
                heads,
                read("num_key_value_heads", heads),
                size,
                rotaries[i],
                qkv_bias,
                out_bias,
                qk_norm,
                windows[i] if windows else None,
                dropout=read.rate("attention_dropout"),
                **(attention or {}),
            ),
            mlps[i],
            **(layer or {}),
        )
        for i in range(count)
    )
    return DecoderSpec(
        read.need("vocab_size"),
        hidden,
        read("max_position_embeddings", 2048),
        norm or rms(read),
        layers,
        bool(read("tie_word_embeddings", tied)),
        **whole,
    )


def rms(read: ConfigReader, kind: str = "rms", eps: float = 1e-6) -> NormSpec:
    """The usual root-mean-square norm."""
    return NormSpec(kind, read("rms_norm_eps", eps))


def gated(read: ConfigReader, act: str = "silu", **fields: Any) -> MlpSpec:
    """The usual gated MLP; `act` is the default activation."""
    return MlpSpec(read.need("intermediate_size"), read("hidden_act", act), **fields)


def layer_types(read: ConfigReader, default: Sequence[str]) -> list[str]:
    """`layer_types`, one of full_, sliding_ and chunked_attention for each layer, or `default`."""
    count = read.need("num_hidden_layers")
    kinds = list(read("layer_types", default))
    unknown = set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"}
    if unknown or len(kinds) != count:
        raise ConfigError(f"layer_types={kinds!r} does not describe {count} layers")
    return kinds


def every_nth_full(read: ConfigReader, n: int) -> list[str]:
    """The layer types of a pattern: `n` - 1 sliding layers, then a full one."""
    count = read.need("num_hidden_layers")
    return ["full_attention" if (i + 1) % n == 0 else "sliding_attention" for i in range(count)]


def windowed(kinds: Sequence[str], window: int | None) -> list[int | None]:
    """`window` on the sliding layers."""
    return [window if kind == "sliding_attention" else None for kind in kinds]


def windows_by_layer(read: ConfigReader) -> list[int | None]:
    """Qwen's windows: `layer_types`, or the layers from `max_window_layers` on."""
    count, used = read.need("num_hidden_layers"), read("use_sliding_window", False)
    window, first = read("sliding_window", 4096), read("max_window_layers", 28)
    late = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return windowed(layer_types(read, late), window if used else None)


def same_window(read: ConfigReader) -> list[int | None]:
    """`sliding_window` on every layer; none where it is absent or null."""
    return [read("sliding_window")] * read.need("num_hidden_layers")


def multipliers(read: ConfigReader) -> dict[str, Any]:
    """Granite's factors, as arguments of `llama_like`."""
    return {
        "attention": {"scale": read("attention_multiplier", 1.0)},
        "layer": {"residual": read("residual_multiplier", 1.0)},
        "input_scale": read("embedding_multiplier", 1.0),
        "head": HeadSpec(scale=1 / read("logits_scaling", 1.0)),
    }
