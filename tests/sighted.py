"""Tiny models of images in texts, each with its processor, and rows with images."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors

from topwork import AutoModelForImageTextToText, Config
from topwork.media import ImageProcessor, ImageTextProcessor
from topwork.media.image_text import STYLES
from topwork.text import Tokenizer

SPECIAL = [
    "<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<|image_pad|>",
    *(f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)),
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}TOKEN{% endif %}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = {
    "vocab_size": 300, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 2, 1]}
CROPPED = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
WHOLE = {"size": {"height": 16, "width": 16}}
# Family → its model's configuration, its style, its image processor, options, placeholder.
FAMILIES = {
    "llava": (
        {"vision_config": {"model_type": "clip_vision_model", **TOWER},
         "text_config": {"model_type": "llama", **TEXT}},
        "LlavaProcessor", ("CLIPImageProcessor", CROPPED),
        {"patch_size": 4, "num_additional_image_tokens": 1,
         "vision_feature_select_strategy": "default"}, "<image>", "<image>",
    ),
    "paligemma": (
        {"vision_config": SIGLIP, "projection_dim": 40, "hidden_size": 40,
         "text_config": {"model_type": "gemma", "head_dim": 8, **TEXT}},
        "PaliGemmaProcessor", ("SiglipImageProcessor", WHOLE), {"image_seq_length": 16},
        "<image>", "<image>",
    ),
    "gemma3": (
        {"mm_tokens_per_image": 4, "vision_config": SIGLIP,
         "text_config": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 19,
                         "layer_types": ["sliding_attention", "full_attention"], **TEXT,
                         "query_pre_attn_scalar": 8}},
        "Gemma3Processor", ("Gemma3ImageProcessor", WHOLE), {"image_seq_length": 4},
        "<start_of_image>", "<image_soft_token>",
    ),
    "idefics3": (
        {"scale_factor": 2, "vision_config": TOWER,
         "text_config": {"model_type": "llama", **TEXT}},
        "Idefics3Processor",
        ("Idefics3ImageProcessor",
         {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}),
        {"image_seq_len": 4}, "<image>", "<image>",
    ),
    "qwen2_vl": (
        {"vision_config": {"depth": 2, "num_heads": 3, "patch_size": 4, "in_channels": 3,
                           "spatial_merge_size": 2, "embed_dim": 24, "hidden_size": 40,
                           "mlp_ratio": 1},
         "text_config": {**TEXT, "rope_parameters": ROPE}, "video_token_id": 297,
         "vision_start_token_id": 298, "vision_end_token_id": 299},
        "Qwen2VLProcessor",
        ("Qwen2VLImageProcessor", {"patch_size": 4, "min_pixels": 128, "max_pixels": 1024}),
        {}, "<|image_pad|>", "<|image_pad|>",
    ),
}  # fmt: skip
FAMILIES["smolvlm"] = (
    FAMILIES["idefics3"][0], "SmolVLMProcessor",
    ("SmolVLMImageProcessor", FAMILIES["idefics3"][2][1]), *FAMILIES["idefics3"][3:],
)  # fmt: skip
FAMILIES["qwen2_5_vl"] = (
    {**FAMILIES["qwen2_vl"][0],
     "vision_config": {"depth": 2, "num_heads": 3, "patch_size": 4, "in_channels": 3,
                       "spatial_merge_size": 2, "hidden_size": 24, "out_hidden_size": 40,
                       "intermediate_size": 28, "window_size": 16, "fullatt_block_indexes": [1]}},
    "Qwen2_5_VLProcessor", *FAMILIES["qwen2_vl"][2:],
)  # fmt: skip


def tokenizer(bos: bool = True) -> Tokenizer:
    """Bytes as tokens; `bos` before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
        )
    made = Tokenizer(core, {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"})
    made.add_tokens(SPECIAL, special=True)
    return made


def pair(family: str, seed: int = 0) -> SimpleNamespace:
    """A tiny model of random weights, and the processor that belongs to it."""
    values, style, (kind, images), options, token, inside = FAMILIES[family]
    text = tokenizer(bos=family not in ("paligemma", "qwen2_vl", "qwen2_5_vl"))
    around = f"[{token}]" if family.startswith("qwen") else token  # as its vision_start and _end
    template = None if family == "paligemma" else TEMPLATE.replace("TOKEN", around)
    processor = ImageTextProcessor(
        ImageProcessor(kind, **images), text, STYLES[style], dict(options), template
    )
    image = text.convert_tokens_to_ids(inside)
    name = "image_token_index" if family in ("gemma3", "llava", "paligemma") else "image_token_id"
    values = {**values, name: image, "tie_word_embeddings": False}
    torch.manual_seed(seed)
    config = Config(model_type=family, **json.loads(json.dumps(values)))
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (0.2 if value.dim() > 1 else 0.4))
    return SimpleNamespace(model=model, processor=processor, image=image)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(asked: str, answer: str, *images, column: bool = False) -> dict:
    """A question with images and its answer; the images inline, or in a column beside them."""
    entries = [{"type": "image"} if column else {"type": "image", "image": i} for i in images]
    messages = [
        {"role": "user", "content": [*entries, {"type": "text", "text": asked}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"messages": messages, "images": list(images)} if column else {"messages": messages}


def rows(family: str = "llava") -> list[dict]:
    """Rows with one image, two, none, and one of another shape."""
    pictures = [picture(24, 16), picture(16, 30, 1), picture(20, 20, 2)]
    if family == "paligemma":
        return [
            {"prompt": "<image>what", "completion": "a dog", "images": [pictures[0]]},
            {"prompt": "<image><image>which", "completion": "both of them", "images": pictures[:2]},
            {"prompt": "<image>how many", "completion": "3", "image": pictures[2]},
        ]
    return [
        chat("what?", "a dog", pictures[0]),
        chat("which?", "both of them", *pictures[:2]),
        {"messages": [{"role": "user", "content": "hello"},
                      {"role": "assistant", "content": "good day"}]},
        chat("how many?", "3", pictures[2], column=True),
    ]  # fmt: skip
