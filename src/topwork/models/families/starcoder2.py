"""StarCoder2: LayerNorms, biases everywhere, an MLP without a gate."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import llama_like, same_window
from topwork.nn.layers import PlainMlpSpec
from topwork.nn.norms import NormSpec

CASES = [
    {},
    {"sliding_window": 4, "tie_word_embeddings": True, "norm_epsilon": 0.1},
    {"use_bias": False, "hidden_act": "silu", "num_attention_heads": 4, "num_key_value_heads": 2,
     "rope_theta": 100.0},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    bias, rate = read("use_bias", True), read.rate("residual_dropout")
    read.ignore("activation_function", "norm_type", "layer_norm_epsilon", "mlp_type",
                "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
                "scale_attn_weights")  # fmt: skip
    mlp = PlainMlpSpec(
        read.need("intermediate_size"),
        read("hidden_act", "gelu_pytorch_tanh"),
        bias,
        ("c_fc", "c_proj"),
    )
    return llama_like(
        read,
        norm=NormSpec("layer-bias", read("norm_epsilon", 1e-5)),
        windows=same_window(read),
        qkv_bias=bias,
        out_bias=bias,
        mlp=mlp,
        layer={"dropout": (rate, rate)},
        tied=True,
        embedding_dropout=read.rate("embedding_dropout"),
    )
