"""Pegasus: sines for positions, which its files hold; norms before each part."""

from topwork.models.families._bart import BART_CASES, bart_like
from topwork.models.seq2seq import Seq2SeqModel

CASES = BART_CASES
MODELS = {
    "seq2seq-lm": lambda config, read: Seq2SeqModel(
        config, bart_like(read, norm_first=True, embedding_norm=False, places="stored")
    )
}
