"""GPTBigCode (SantaCoder, StarCoder 1): GPT-2 with plain linears and one key/value head."""

from topwork.models.config import ConfigReader
from topwork.models.families import gpt2
from topwork.models.families._gpt import models
from topwork.models.gpt import GptAttentionSpec, GptLayerSpec, GptMlpSpec, GptSpec

TINY = gpt2.TINY
CASES = [
    {},
    {"multi_query": False, "activation_function": "relu"},
    {"scale_attn_weights": False, "layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": True, "n_inner": None, "activation_function": "gelu"},
]


def gpt_spec(read: ConfigReader) -> GptSpec:
    read.ignore(
        "num_key_value_heads", "inference_runner", "max_batch_size", "max_sequence_length",
        "pad_key_length", "pre_allocate_kv_cache", "validate_runner_input",
    )  # fmt: skip
    hidden, heads = read.need("n_embd"), read.need("n_head")
    size = hidden // heads
    rate = read.rate("resid_pdrop", 0.1)
    # With many key/value heads each has its q, k and v side by side; one head is both layouts.
    layer = GptLayerSpec(
        GptAttentionSpec(
            heads,
            1 if read("multi_query", True) else heads,
            size,
            size**-0.5 if read("scale_attn_weights", True) else 1.0,
            grouped=True,
            dropout=read.rate("attn_pdrop", 0.1),
        ),
        GptMlpSpec(read("n_inner", 4 * hidden), read("activation_function", "gelu_pytorch_tanh")),
        dropout=(rate, rate),
    )
    return GptSpec(
        names=gpt2.NAMES,
        vocab=read.need("vocab_size"),
        hidden=hidden,
        inner=hidden,
        context=read("n_positions", 1024),
        norm_eps=read("layer_norm_epsilon", 1e-5),
        layers=(layer,) * read.need("n_layer"),
        tied=read("tie_word_embeddings", True),
        learned=0,
        dropout=read.rate("embd_pdrop", 0.1),
    )


MODELS = models(gpt_spec, without=("question-answering",))
