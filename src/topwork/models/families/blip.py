"""BLIP: captions of images, and answers to questions about them, by a BERT that looks at a ViT."""

from typing import Any

from topwork.errors import ConfigError
from topwork.models.config import Config, ConfigReader
from topwork.models.families._vision import pair
from topwork.models.prenorm import PreNormNames, PreNormSpec
from topwork.models.readers import Captioner, ImageAnswerer, ReaderSpec
from topwork.models.stack import StackNames, StackSpec
from topwork.models.vision import PatchSpec, VisionSpec
from topwork.nn.layers import activation
from topwork.nn.norms import NormSpec
from topwork.nn.places import LearnedPlaces
from topwork.weights import Table

CASES: list[dict[str, Any]] = [
    {},
    {"text_config": {"hidden_act": "gelu_new", "layer_norm_eps": 0.1},
     "vision_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 0.1}},
    {"text_config": {"num_attention_heads": 2, "label_smoothing": 0.2},
     "vision_config": {"patch_size": 8, "num_attention_heads": 2}},
    {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
]  # fmt: skip
NAMES = StackNames(
    blocks="encoder.layer",
    attention="attention",
    attention_norm="attention.output.LayerNorm",
    cross="crossattention",
    cross_norm="crossattention.output.LayerNorm",
    projections=("self.query", "self.key", "self.value", "output.dense"),
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
    embedding_norm="embeddings.LayerNorm",
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
)


def tower(read: ConfigReader) -> VisionSpec:
    hidden = read("hidden_size", 768)
    patches = PatchSpec(
        read("num_channels", 3),
        hidden,
        pair(read("image_size", 384)),
        pair(read("patch_size", 16)),
        projection="embeddings.patch_embedding",
        first="embeddings.class_embedding",
        positions="embeddings.position_embedding",
    )
    block = PreNormSpec(
        hidden,
        read("num_attention_heads", 12),
        read("intermediate_size", 3072),
        read("hidden_act", "gelu"),
        read("layer_norm_eps", 1e-5),
        attention_dropout=read.rate("attention_dropout"),
        names=PreNormNames(fused="self_attn.qkv", out="self_attn.projection"),
    )
    read.ignore("projection_dim", "initializer_factor", "dropout", "hidden_dropout_prob")
    return VisionSpec(patches, block, read("num_hidden_layers", 12), final_norm="post_layernorm")


def stack(read: ConfigReader, memory: int, ahead: bool) -> StackSpec:
    """A stack of texts that looks at what is `memory` wide; `ahead`: all tokens see each other."""
    hidden, heads = read("hidden_size", 768), read("num_attention_heads", 8)
    context = read("max_position_embeddings", 512)
    read.ignore("encoder_hidden_size", "projection_dim", "is_decoder", "initializer_factor",
                "label_smoothing", "tie_word_embeddings", "position_embedding_type")  # fmt: skip
    return StackSpec(
        read("vocab_size", 30524),
        hidden,
        heads,
        hidden // heads,
        read("intermediate_size", 3072),
        read("num_hidden_layers", 12),
        activation(read("hidden_act", "gelu")),
        NormSpec("layer-bias", read("layer_norm_eps", 1e-12)),
        (hidden // heads) ** -0.5,
        bias=True,
        norm_first=False,
        names=NAMES,
        crossed=True,
        context=context,
        places=lambda: LearnedPlaces(context, hidden, 0),
        dropout=read.rate("hidden_dropout_prob"),
        attention_dropout=read.rate("attention_probs_dropout_prob"),
        memory=memory,
        ahead=ahead,
    )


def _parts(read: ConfigReader, asks: bool) -> tuple[ReaderSpec, Config]:
    vision = read.part("vision_config", "vision_config_dict", model_type="blip_vision_model")
    text = read.part("text_config", "text_config_dict", model_type="blip_text_model")
    seen = tower(vision)
    decoder = stack(text, seen.hidden, ahead=False)
    if asks and decoder.hidden != seen.hidden:
        raise ConfigError(
            f"hidden_size of text_config ({decoder.hidden}) and of vision_config ({seen.hidden}) "
            "must be one: the decoder looks at the question as the question does at the image"
        )
    encoder = stack(text, seen.hidden, ahead=True) if asks else None
    read.ignore("projection_dim", "logit_scale_init_value", "image_text_hidden_size",
                "initializer_factor", "label_smoothing")  # fmt: skip
    tied = bool(read("tie_word_embeddings", True)) or bool(text("tie_word_embeddings", True))
    other = r"^text_encoder\." if not asks else r"^\b$"
    drop = (r"embeddings\.position_ids$", r"^(vision_proj|text_proj|itm_head)\.", other)
    spec = ReaderSpec(
        seen, decoder, encoder, Table(drop=drop), smoothing=text("label_smoothing", 0.0),
        tied=tied,
    )  # fmt: skip
    return spec, vision.config


def captioner(config: Config, read: ConfigReader) -> Captioner:
    spec, vision = _parts(read, asks=False)
    return Captioner(config, spec, vision)


def answerer(config: Config, read: ConfigReader) -> ImageAnswerer:
    spec, vision = _parts(read, asks=True)
    return ImageAnswerer(config, spec, vision)


MODELS = {"image-text-to-text": captioner, "visual-question-answering": answerer}
