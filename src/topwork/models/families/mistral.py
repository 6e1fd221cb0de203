"""Mistral 7B and its relatives: Llama with a sliding window on every layer."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import llama_like

CASES = [
    {"sliding_window": None},
    {"sliding_window": 5, "num_key_value_heads": 5},
    {"sliding_window": 3, "head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 3,
     "hidden_size": 48, "rope_theta": 100.0},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    # Absent means the 4096 of Mistral 7B v0.1; null means none.
    window = read("sliding_window") if read.has("sliding_window") else 4096
    return llama_like(read, windows=[window] * read.need("num_hidden_layers"))
