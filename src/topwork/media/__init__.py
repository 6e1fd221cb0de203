"""Sounds for models: read, brought to the model's rate, turned into its features."""

from topwork.media.audio import read_audio, resample
from topwork.media.features import AutoFeatureExtractor, LogMel, Waveform
from topwork.media.processor import AutoProcessor, SpeechProcessor

__all__ = [
    "AutoFeatureExtractor", "AutoProcessor", "LogMel", "SpeechProcessor", "Waveform",
    "read_audio", "resample",
]  # fmt: skip
