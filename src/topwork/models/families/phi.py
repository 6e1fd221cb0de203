"""Phi 1, 1.5 and 2: attention and MLP side by side behind one LayerNorm, partial rotary."""

from topwork.models.config import ConfigReader
from topwork.models.decoder import ONE_NORM, DecoderSpec, HeadSpec
from topwork.models.families._common import head_size, llama_like, read_rotary
from topwork.nn.layers import PlainMlpSpec, QkNorm
from topwork.nn.norms import NormSpec
from topwork.weights import Rename, Table

CASES = [
    {},
    {"qk_layernorm": True, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
     "hidden_act": "relu"},
    {"partial_rotary_factor": 1.0, "tie_word_embeddings": True, "layer_norm_eps": 0.1,
     "rope_theta": 100.0},
]  # fmt: skip


def spec(read: ConfigReader) -> DecoderSpec:
    norm = NormSpec("layer-bias", read("layer_norm_eps", 1e-5))
    on_heads = QkNorm(norm, names=("q_layernorm", "k_layernorm"))
    rate = read.rate("resid_pdrop")
    mlp = PlainMlpSpec(
        read.need("intermediate_size"), read("hidden_act", "gelu_new"), names=("fc1", "fc2")
    )
    return llama_like(
        read,
        norm=norm,
        rotary=read_rotary(read, head_size(read), share=0.5),
        qkv_bias=True,
        out_bias=True,
        qk_norm=on_heads if read("qk_layernorm", False) else None,
        mlp=mlp,
        attention={"out": "dense"},
        layer={"norms": ONE_NORM, "parallel": True, "dropout": (rate, rate)},
        embedding_dropout=read.rate("embd_pdrop"),
        head=HeadSpec(bias=True),
        table=Table((Rename("final_layernorm", "norm"),)),
    )
