"""XLM-RoBERTa: RoBERTa in a hundred languages (also multilingual E5 and BGE-M3)."""

from topwork.models.encoder_heads import encoder_models
from topwork.models.families._encoders import ROBERTA_CASES, roberta_like

CASES = ROBERTA_CASES
MODELS = encoder_models(roberta_like)
