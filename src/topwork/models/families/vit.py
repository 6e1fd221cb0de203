"""ViT: patches behind a learned first token, and DINO and MAE-tuned models in its shape."""

from dataclasses import replace

from topwork.models.config import ConfigReader
from topwork.models.families._vision import pair, renamed_heads, tower_models
from topwork.models.prenorm import PreNormNames, PreNormSpec
from topwork.models.vision import DensePooling, PatchSpec, VisionSpec
from topwork.models.vision_heads import ClassSpec, first_token
from topwork.weights import Rename, Table

CASES = [
    {},
    {"hidden_act": "gelu_new", "layer_norm_eps": 0.1, "qkv_bias": False, "num_channels": 1,
     "pooler_act": "relu", "pooler_output_size": 20},
    {"image_size": [24, 16], "patch_size": [8, 4], "num_attention_heads": 2, "hidden_act": "relu"},
]  # fmt: skip

NAMES = PreNormNames(
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    norm_1="layernorm_before",
    up="intermediate.dense",
    down="output.dense",
    norm_2="layernorm_after",
)


def tower(read: ConfigReader) -> VisionSpec:
    read.ignore("encoder_stride", "gradient_checkpointing")
    hidden = read("hidden_size", 768)
    dropout, eps = read.rate("hidden_dropout_prob"), read("layer_norm_eps", 1e-12)
    patches = PatchSpec(
        read("num_channels", 3), hidden, pair(read("image_size", 224)), pair(read("patch_size", 16))
    )
    block = PreNormSpec(
        hidden,
        read("num_attention_heads", 12),
        read("intermediate_size", 3072),
        read("hidden_act", "gelu"),
        eps,
        dropout,
        bool(read("qkv_bias", True)),
        attention_dropout=read.rate("attention_probs_dropout_prob"),
        names=NAMES,
    )
    pooling = DensePooling(hidden, read("pooler_output_size", hidden), read("pooler_act", "tanh"))
    return VisionSpec(
        patches, block, read("num_hidden_layers", 12), "encoder.layer", dropout,
        final_norm="layernorm", pooling=pooling,
    )  # fmt: skip


NEWER = (
    *renamed_heads("layers"),
    Rename("layers.*.mlp.fc1", "encoder.layer.*.intermediate.dense"),
    Rename("layers.*.mlp.fc2", "encoder.layer.*.output.dense"),
    Rename("layers.*.layernorm_before", "encoder.layer.*.layernorm_before"),
    Rename("layers.*.layernorm_after", "encoder.layer.*.layernorm_after"),
)
MODELS = tower_models(
    "vit",
    tower,
    lambda made: ClassSpec("vit", first_token, made.hidden),
    Table(old=NEWER),
    ("pooler", "embeddings.mask_token", "decoder"),
    lambda made: replace(made, pooling=None),
)
