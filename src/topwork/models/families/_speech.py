"""What the families of speech read alike."""

from __future__ import annotations

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.speech import ConvStack, Shortener, SpeechSpec
from topwork.nn.layers import activation
from topwork.nn.spans import Augment, Spans

# Of learning from sound alone, of other heads, and of the first files.
UNUSED = (
    "codevector_dim", "contrastive_logits_temperature", "diversity_loss_weight",
    "feat_quantizer_dropout", "num_codevector_groups", "num_codevectors_per_group",
    "num_negatives", "proj_codevector_dim", "tdnn_dim", "tdnn_kernel", "tdnn_dilation",
    "xvector_output_dim", "num_feat_extract_layers", "freeze_feat_extract_train",
    "gradient_checkpointing", "feat_extract_dropout", "vocab_size", "final_dropout",
    "ctc_loss_reduction", "ctc_zero_infinity", "use_weighted_layer_sum", "classifier_proj_size",
    "mask_time_min_space", "mask_time_other", "mask_time_selection", "no_mask_time_overlap",
    "mask_channel_length", "mask_channel_min_space", "mask_channel_other", "mask_channel_prob",
    "mask_channel_selection", "no_mask_channel_overlap",
)  # fmt: skip


def read_augment(read: ConfigReader, on: bool) -> Augment | None:
    """What training hides; `on` is the default of apply_spec_augment."""
    parts = []
    for axis, share, least in (("time", 0.05, 2), ("feature", 0.0, 0)):
        share = read(f"mask_{axis}_prob", share)
        spans = Spans(share, read(f"mask_{axis}_length", 10), read(f"mask_{axis}_min_masks", least))
        parts.append(spans if share > 0 else None)
    return Augment(*parts) if read("apply_spec_augment", on) else None


def speech_spec(read: ConfigReader, prefix: str, norm_features: bool = True) -> SpeechSpec:
    """The spec of an encoder in wav2vec 2.0's shape."""
    read.ignore(*UNUSED)
    hidden, heads = read("hidden_size", 768), read("num_attention_heads", 12)
    if hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}")
    stable, bottleneck = bool(read("do_stable_layer_norm", False)), read("adapter_attn_dim")
    if bottleneck is not None and not stable:
        raise ConfigError("adapter_attn_dim needs do_stable_layer_norm=True")
    shortener = Shortener(
        read("output_hidden_size", hidden),
        read("adapter_kernel_size", 3),
        read("adapter_stride", 2),
        read("num_adapter_layers", 3),
    )
    masks = read("mask_time_prob", 0.05) > 0 or read("mask_feature_prob", 0.0) > 0
    return SpeechSpec(
        prefix,
        read_convs(read),
        hidden,
        heads,
        read("intermediate_size", 3072),
        read("num_hidden_layers", 12),
        activation(read("hidden_act", "gelu"), "hidden_act"),
        read("layer_norm_eps", 1e-5),
        stable,
        (read("num_conv_pos_embeddings", 128), read("num_conv_pos_embedding_groups", 16)),
        read_augment(read, True),
        masks,
        shortener if read("add_adapter", False) else None,
        bottleneck,
        norm_features,
        read.rate("hidden_dropout", 0.1),
        read.rate("activation_dropout", 0.1),
        read.rate("feat_proj_dropout"),
        read.rate("layerdrop", 0.1),
        read.rate("attention_dropout", 0.1),
    )


def read_convs(read: ConfigReader) -> ConvStack:
    """The convolutions over the samples."""
    sizes = tuple(read("conv_dim", (512,) * 7))
    kernels = tuple(read("conv_kernel", (10, 3, 3, 3, 3, 2, 2)))
    strides = tuple(read("conv_stride", (5, 2, 2, 2, 2, 2, 2)))
    if not len(sizes) == len(kernels) == len(strides):
        raise ConfigError(
            f"conv_dim, conv_kernel and conv_stride must be of one length, not {len(sizes)}, "
            f"{len(kernels)} and {len(strides)}"
        )
    norm = read("feat_extract_norm", "group")
    if norm not in ("group", "layer"):
        raise ConfigError(f"feat_extract_norm={norm!r} must be 'group' or 'layer'")
    act = activation(read("feat_extract_activation", "gelu"), "feat_extract_activation")
    return ConvStack(sizes, kernels, strides, bool(read("conv_bias", False)), norm, act)
