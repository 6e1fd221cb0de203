"""BART (also distilbart, and bart-large-mnli for zero-shot classes)."""

from topwork.models.config import ConfigReader
from topwork.models.families._bart import BART_CASES, bart_like
from topwork.models.seq2seq import Seq2SeqModel, Seq2SeqSpec
from topwork.models.seq2seq_heads import Seq2SeqClassifier

CASES = BART_CASES


def spec_of(read: ConfigReader) -> Seq2SeqSpec:
    return bart_like(read, norm_first=False, embedding_norm=True, places="learned")


MODELS = {
    "seq2seq-lm": lambda config, read: Seq2SeqModel(config, spec_of(read)),
    "sequence-classification": lambda config, read: Seq2SeqClassifier(
        config, spec_of(read), read.rate("classifier_dropout")
    ),
}
