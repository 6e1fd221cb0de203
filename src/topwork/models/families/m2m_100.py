"""M2M-100 and NLLB: a hundred languages and more, fairseq's sines, norms before each part."""

from topwork.models.families._bart import BART_CASES, bart_like
from topwork.models.seq2seq import Seq2SeqModel

CASES = [
    *BART_CASES,
    {"scale_embedding": False, "activation_function": "gelu"},
]
MODELS = {
    "seq2seq-lm": lambda config, read: Seq2SeqModel(
        config,
        bart_like(read, norm_first=True, embedding_norm=False, places="fairseq", scaled=True,
                  bias=False, act="relu", rates=(0.1, 0.05),
                  drop=(r"embed_positions\.weights?$",)),
    )
}  # fmt: skip
