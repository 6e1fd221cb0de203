"""HuBERT: wav2vec 2.0's encoder, taught by clusters of sound (arXiv:2106.07447)."""

from __future__ import annotations

from typing import Any

from topwork.models.config import ConfigReader
from topwork.models.families._speech import speech_spec
from topwork.models.speech import SpeechSpec
from topwork.models.speech_heads import speech_models

CASES: list[dict[str, Any]] = [
    {},
    {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
     "feat_proj_layer_norm": False, "use_weighted_layer_sum": True, "classifier_proj_size": 20},
    {"num_conv_pos_embeddings": 7, "feat_extract_activation": "relu", "layer_norm_eps": 1e-3,
     "ctc_loss_reduction": "mean"},
]  # fmt: skip


def spec_of(read: ConfigReader) -> SpeechSpec:
    read.only("conv_pos_batch_norm", False)
    return speech_spec(read, "hubert", norm_features=bool(read("feat_proj_layer_norm", True)))


MODELS = speech_models(spec_of)
