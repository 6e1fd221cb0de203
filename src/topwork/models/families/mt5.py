"""mT5: T5 1.1 in a hundred languages; its head is not scaled."""

from topwork.models.config import ConfigReader
from topwork.models.families.t5 import t5_like
from topwork.models.seq2seq import Seq2SeqModel, Seq2SeqSpec

CASES = [
    {},
    {"feed_forward_proj": "relu", "d_kv": 6},
    {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
     "num_decoder_layers": 1, "layer_norm_epsilon": 0.01},
]  # fmt: skip


def spec_of(read: ConfigReader) -> Seq2SeqSpec:
    read.ignore("tie_word_embeddings", "tokenizer_class")
    return t5_like(read, scaled=False, feed="gated-gelu")


MODELS = {"seq2seq-lm": lambda config, read: Seq2SeqModel(config, spec_of(read))}
