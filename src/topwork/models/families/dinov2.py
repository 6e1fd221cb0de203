"""DINOv2: ViT with a learned scale on each part, for images of any size."""

from topwork.models.config import ConfigReader
from topwork.models.families._vision import pair, renamed_heads, tower_models
from topwork.models.prenorm import PreNormNames, PreNormSpec
from topwork.models.vision import FirstToken, PatchSpec, VisionSpec
from topwork.models.vision_heads import ClassSpec, first_and_mean
from topwork.weights import Pack, Rename, Table

CASES = [
    {},
    {"use_swiglu_ffn": True, "mlp_ratio": 3, "layerscale_value": 0.5, "layer_norm_eps": 0.1,
     "num_channels": 1, "qkv_bias": False},
    {"image_size": 32, "patch_size": 8, "hidden_act": "relu", "num_attention_heads": 2,
     "use_mask_token": False, "mlp_ratio": 2},
]  # fmt: skip


def tower(read: ConfigReader, registers: int = 0) -> VisionSpec:
    read.ignore(
        "intermediate_size", "apply_layernorm", "out_features",
        "out_indices", "reshape_hidden_states", "stage_names", "gradient_checkpointing",
    )  # fmt: skip
    hidden, gated = read("hidden_size", 768), bool(read("use_swiglu_ffn", False))
    width = int(hidden * read("mlp_ratio", 4))
    if gated:  # two thirds of it, rounded up to a multiple of eight
        width = (int(width * 2 / 3) + 7) // 8 * 8
    names = PreNormNames(
        query="attention.attention.query",
        key="attention.attention.key",
        value="attention.attention.value",
        out="attention.output.dense",
        norm_1="norm1",
        norm_2="norm2",
        up="mlp.weights_in" if gated else "mlp.fc1",
        down="mlp.weights_out" if gated else "mlp.fc2",
    )
    masks = registers > 0 or read("use_mask_token", True)
    patches = PatchSpec(
        read("num_channels", 3),
        hidden,
        pair(read("image_size", 224)),
        pair(read("patch_size", 14)),
        registers=registers,
        mask="embeddings.mask_token" if masks else None,
        any_size=True,
        antialias=registers > 0,
    )
    block = PreNormSpec(
        hidden,
        read("num_attention_heads", 12),
        width,
        read("hidden_act", "gelu"),
        read("layer_norm_eps", 1e-6),
        qkv_bias=bool(read("qkv_bias", True)),
        layer_scale=read("layerscale_value", 1.0),
        gated=gated,
        drop_path=read.rate("drop_path_rate"),
        attention_dropout=read.rate("attention_probs_dropout_prob"),
        names=names,
    )
    return VisionSpec(
        patches, block, read("num_hidden_layers", 12), "encoder.layer",
        read.rate("hidden_dropout_prob"), final_norm="layernorm", pooling=FirstToken(),
    )  # fmt: skip


def classes(home: str, made: VisionSpec) -> ClassSpec:
    return ClassSpec(home, first_and_mean(made.patches.lead), 2 * made.hidden)


# The names that newer software gives them.
NEWER = Table(
    old=(
        *renamed_heads("encoder.layer"),
        Rename("mlp.down_proj", "mlp.weights_out"),
        Pack(("mlp.gate_proj", "mlp.up_proj"), "mlp.weights_in"),
    )
)
MODELS = tower_models("dinov2", tower, lambda made: classes("dinov2", made), NEWER)
