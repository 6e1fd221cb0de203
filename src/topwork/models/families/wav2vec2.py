"""wav2vec 2.0, XLS-R and MMS: raw sound, convolutions that tell positions (arXiv:2006.11477)."""

from __future__ import annotations

from typing import Any

from topwork.models.config import ConfigReader
from topwork.models.families._speech import speech_spec
from topwork.models.speech import SpeechSpec
from topwork.models.speech_heads import speech_models

CASES: list[dict[str, Any]] = [
    {},
    {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
     "num_conv_pos_embeddings": 7, "num_conv_pos_embedding_groups": 4,
     "use_weighted_layer_sum": True, "classifier_proj_size": 20, "adapter_attn_dim": 10,
     "mask_time_prob": 0.0},
    {"do_stable_layer_norm": True, "feat_extract_activation": "relu", "hidden_act": "gelu_new",
     "layer_norm_eps": 1e-3, "conv_dim": [8, 16], "conv_kernel": [6, 3], "conv_stride": [3, 2],
     "ctc_loss_reduction": "mean", "ctc_zero_infinity": True},
    {"use_weighted_layer_sum": True, "mask_feature_prob": 0.1, "mask_feature_length": 4},
]  # fmt: skip
# A classifier has no adapter behind its blocks: these are for the other heads.
SHORTENED: list[dict[str, Any]] = [
    {"add_adapter": True},
    {"add_adapter": True, "output_hidden_size": 32, "num_adapter_layers": 1, "adapter_stride": 3},
]


def spec_of(read: ConfigReader) -> SpeechSpec:
    return speech_spec(read, "wav2vec2")


MODELS = speech_models(spec_of)
