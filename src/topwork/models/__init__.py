"""Models: one decoder, declared families, the Auto classes."""

from topwork.models.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoModelForVision2Seq,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
)
from topwork.models.base import CausalLMOutput, CausalModel, Model
from topwork.models.capabilities import capabilities
from topwork.models.config import Config
from topwork.models.describe import describe

__all__ = [
    "AutoConfig", "AutoModel", "AutoModelForAudioClassification", "AutoModelForCTC",
    "AutoModelForSpeechSeq2Seq", "AutoModelForCausalLM", "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice", "AutoModelForQuestionAnswering", "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForImageTextToText", "AutoModelForVision2Seq",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForZeroShotImageClassification", "CausalLMOutput",
    "CausalModel", "Config", "Model", "capabilities", "describe",
]  # fmt: skip
