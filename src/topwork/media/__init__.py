"""Images and sounds for models: read, brought to the model's size or rate, turned into tensors."""

from topwork.media.audio import read_audio, resample
from topwork.media.features import AutoFeatureExtractor, LogMel, Waveform
from topwork.media.image_processor import AutoImageProcessor, ImageProcessor
from topwork.media.image_text import ImageTextProcessor
from topwork.media.images import load_image
from topwork.media.processor import AutoProcessor, SpeechProcessor

__all__ = [
    "AutoFeatureExtractor", "AutoImageProcessor", "AutoProcessor", "ImageProcessor",
    "ImageTextProcessor", "LogMel",
    "SpeechProcessor", "Waveform", "load_image", "read_audio", "resample",
]  # fmt: skip
