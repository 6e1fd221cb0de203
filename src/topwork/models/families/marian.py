"""Marian (the OPUS-MT translators): sines for positions; two vocabularies in some."""

from topwork.models.families._bart import BART_CASES, bart_like
from topwork.models.seq2seq import Seq2SeqModel

CASES = [
    *BART_CASES,
    {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 50},
]
PLACES = (r"embed_positions\.weight$",)
MODELS = {
    "seq2seq-lm": lambda config, read: Seq2SeqModel(
        config,
        bart_like(read, norm_first=False, embedding_norm=False, places="sines", drop=PLACES),
    )
}
