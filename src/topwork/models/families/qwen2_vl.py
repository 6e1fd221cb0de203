"""Qwen2-VL: images of any size, whose tokens stand on their grid (M-RoPE) in a Qwen 2."""

from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.decoder import DecoderSpec
from topwork.models.families._common import head_size, llama_like, rotary_of, windows_by_layer
from topwork.models.families._multimodal import BUFFERS, image_text_models, tying
from topwork.models.multimodal import GridPlaces, ImageTextSpec
from topwork.models.patches import GridSight, GridTowerSpec
from topwork.nn.layers import PlainMlpSpec
from topwork.nn.norms import NormSpec
from topwork.weights import Rename, Table

CASES: list[dict[str, Any]] = [
    {},
    {"vision_config": {"spatial_merge_size": 1, "temporal_patch_size": 1, "hidden_act": "gelu",
                       "rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
     "tie_word_embeddings": True},
    {"text_config": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                         "mrope_section": [1, 1, 2]}},
     "vision_config": {"mlp_ratio": 2, "in_channels": 1}},
]  # fmt: skip
# The Hub's files name the decoder `model` and the tower `visual`.
NEWER = (Rename("^model.visual", "^visual"), Rename("^model.language_model", "^model"))
# peft sees the modules of the newer layout, and names them so in its files.
PARTS = ("embed_tokens", "layers", "norm")
ADAPTERS = Table(
    (
        *(Rename(f"^model.language_model.{name}", f"^model.{name}") for name in PARTS),
        Rename("^model.visual", "^visual"),
    )
)
USUAL_TEXT = {
    "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip


def decoder_spec(read: ConfigReader) -> tuple[ConfigReader, DecoderSpec]:
    """The decoder, whose options stand under text_config or, in older files, beside the rest."""
    nested = bool(read("text_config"))
    text = read.part("text_config", model_type="text", usual=USUAL_TEXT) if nested else read
    options = {**(text("rope_scaling") or {}), **(text("rope_parameters") or {})}
    sections = tuple(options.pop("mrope_section", (16, 24, 24)))
    for key in ("type", "rope_type"):  # old files call the sections a kind of scaling
        options[key] = "default" if options.get(key) == "mrope" else options.get(key)
    options.setdefault("rope_theta", text("rope_theta", 1e6))
    rotary = rotary_of(text, options, head_size(text), False, {}, {"sections": sections})
    decoder = llama_like(text, rotary=rotary, windows=windows_by_layer(text), qkv_bias=True)
    text.ignore("vision_config", "image_token_id", "video_token_id")
    return text, decoder


def grid_tower(read: ConfigReader, key: str) -> dict[str, Any]:
    """What both towers read alike; `key` names the tower's own size."""
    frames = read("temporal_patch_size", 2)
    patch = read("patch_size", 14)
    for name, size in (("temporal_patch_size", frames), ("patch_size", patch)):
        if not isinstance(size, int):
            raise ConfigError(f"vision_config {name}={size!r} must be one number")
    rope = dict(read("rope_parameters", {}))
    if rope.pop("rope_type", "axial") != "axial":
        raise ConfigError(f"vision_config rope_parameters {rope}: only the axial kind is known")
    theta = float(rope.pop("rope_theta", 10000.0))
    if rope:
        raise ConfigError(f"vision_config rope_parameters {sorted(rope)} have no meaning")
    # Of old files; in_channels is the one that counts.
    read.ignore("in_chans", "spatial_patch_size", "tokens_per_second")
    return {
        "channels": read("in_channels", 3),
        "hidden": read(key),
        "heads": read("num_heads", 16),
        "count": read("depth", 32),
        "patch": patch,
        "frames": frames,
        "merge": read("spatial_merge_size", 2),
        "theta": theta,
    }


def whole(read: ConfigReader, tower: GridTowerSpec) -> ImageTextSpec:
    text, decoder = decoder_spec(read)
    tied = bool(read("tie_word_embeddings", False)) or decoder.tied
    read.ignore("video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    text.ignore("vision_start_token_id", "vision_end_token_id", "vision_token_id")
    if tower.out != decoder.hidden:
        raise ConfigError(
            f"the tower gives {tower.out} numbers, the decoder takes {decoder.hidden}"
        )
    return ImageTextSpec(
        tying(decoder, tied),
        GridSight(tower),
        read("image_token_id", 151655),
        "model",
        "lm_head",
        Table(old=NEWER, drop=BUFFERS),
        places=GridPlaces(tower.merge),
        adapters=ADAPTERS,
    )


def image_text(read: ConfigReader) -> ImageTextSpec:
    vision = read.part("vision_config", model_type="qwen2_vl_vision", usual={"embed_dim": 1280})
    same = grid_tower(vision, "embed_dim")
    width = int(same["hidden"] * vision("mlp_ratio", 4))
    tower = GridTowerSpec(
        **same,
        out=vision("hidden_size", 3584),
        norm=NormSpec("layer-bias", 1e-6),
        mlp=PlainMlpSpec(width, vision("hidden_act", "quick_gelu"), names=("fc1", "fc2")),
    )
    return whole(read, tower)


MODELS = image_text_models(image_text)
