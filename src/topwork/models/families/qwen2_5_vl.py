"""Qwen2.5-VL: Qwen2-VL with a tower of gated blocks, most of which look at a window."""

from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import ConfigReader
from topwork.models.families._multimodal import image_text_models
from topwork.models.families.qwen2_vl import grid_tower, whole
from topwork.models.multimodal import ImageTextSpec
from topwork.models.patches import GridTowerSpec
from topwork.nn.layers import MlpSpec
from topwork.nn.norms import NormSpec

CASES: list[dict[str, Any]] = [
    {},
    {"vision_config": {"window_size": 16, "fullatt_block_indexes": [0], "hidden_act": "gelu"}},
    {"tie_word_embeddings": True, "vision_config": {
        "spatial_merge_size": 1, "window_size": 12, "fullatt_block_indexes": [],
        "rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}}},
]  # fmt: skip


def image_text(read: ConfigReader) -> ImageTextSpec:
    vision = read.part("vision_config", model_type="qwen2_5_vl_vision", usual={"hidden_size": 3584})
    same = grid_tower(vision, "hidden_size")
    window = vision("window_size", 112) // same["merge"] // same["patch"]
    if window < 1:
        raise ConfigError("vision_config window_size is smaller than one token")
    tower = GridTowerSpec(
        **same,
        out=vision("out_hidden_size", 3584),
        norm=NormSpec("rms", 1e-6),
        mlp=MlpSpec(vision("intermediate_size", 3420), vision("hidden_act", "silu"), bias=True),
        window=window,
        full=frozenset(vision("fullatt_block_indexes", (7, 15, 23, 31))),
    )
    return whole(read, tower)


MODELS = image_text_models(image_text)
