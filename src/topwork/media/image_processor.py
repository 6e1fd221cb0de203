"""`AutoImageProcessor`: from images to the tensors that a model reads, as its files say.

One processor for all: a `Kind` holds the usual options of one `image_processor_type` and the two
things that may differ, how an image becomes tiles of pixels and how the tiles become tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, DataError, nearest
from topwork.media import image_steps as steps
from topwork.media import tiles
from topwork.media.image_steps import Prepared
from topwork.media.images import (
    Pixels,
    as_rgb,
    is_array,
    is_one,
    is_pillow,
    load_image,
    pixels_of,
)
from topwork.text.encoding import Encoding

FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
# Options of every kind, and what they are when neither file nor kind says.
COMMON: dict[str, Any] = {
    "do_convert_rgb": None,
    "do_resize": True,
    "size": None,
    "default_to_square": True,
    "resample": 2,
    "do_center_crop": None,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": None,
    "image_std": None,
    "do_pad": None,
    "pad_size": None,
    "input_data_format": None,
}
SIZES = ("size", "crop_size", "pad_size")
# What files say beside the options.
INERT = frozenset(
    {
        "_valid_processor_keys", "_valid_kwargs_names", "auto_map", "data_format", "device",
        "disable_grouping", "feature_extractor_type", "image_processor_type", "image_seq_length",
        "model_input_names", "processor_class", "return_tensors", "backend", "return_row_col_info",
    }
)  # fmt: skip
STANDARD = ([0.5] * 3, [0.5] * 3)
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

Options = SimpleNamespace


def prepare(pixels: Pixels, options: Options, name: str) -> Prepared:
    """The usual steps, each where its option says so: resize, then crop the middle."""
    if options.do_resize:
        height, width = steps.fitted(pixels.shape[0], pixels.shape[1], options.size)
        pixels = steps.resized(pixels, height, width, options.resample, name)
    if options.do_center_crop:
        crop = options.crop_size
        pixels = steps.centre_cropped(pixels, crop["height"], crop["width"])
    return Prepared([pixels])


def collect(
    arrays: list[list[np.ndarray]], prepared: list[Prepared], options: Options
) -> dict[str, Any]:
    """`pixel_values`: one array [channels, H, W] for each image; with `do_pad` all as large as
    `pad_size` or the largest."""
    rows = [tile for one in arrays for tile in one]
    if options.do_pad:
        height, width = (max(row.shape[axis] for row in rows) for axis in (1, 2))
        if options.pad_size:
            height, width = options.pad_size["height"], options.pad_size["width"]
        rows = [steps.padded(row, height, width, f"image {i}") for i, row in enumerate(rows)]
    return {"pixel_values": rows}


Prepare = Callable[[Pixels, Options, str], Prepared]
Collect = Callable[[list[list[np.ndarray]], list[Prepared], Options], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One `image_processor_type`: its usual options (those that `COMMON` lacks are its own), and
    its steps."""

    defaults: Mapping[str, Any]
    prepare: Prepare = prepare
    collect: Collect = collect


def usual(
    size: dict[str, int], resample: int, mean_std: tuple[list[float], list[float]], **more: Any
) -> dict[str, Any]:
    """The options that most kinds set."""
    mean, std = mean_std
    return {"size": size, "resample": resample, "image_mean": mean, "image_std": std, **more}


def shortest_and_crop(side: int) -> dict[str, Any]:
    """Bicubic to `side` along the shortest edge, then the middle (CLIP)."""
    crop = {"height": side, "width": side}
    more = {"default_to_square": False, "do_convert_rgb": True, "do_center_crop": True}
    return usual({"shortest_edge": side}, 3, CLIP, crop_size=crop, **more)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def of_tiles() -> Kind:
    """Idefics 3's and SmolVLM's."""
    own = {"do_image_splitting": True, "max_image_size": {"longest_edge": 364}, "do_pad": True}
    options = usual({"longest_edge": 4 * 364}, 1, STANDARD, do_convert_rgb=True, **own)
    return Kind(options, tiles.prepare_tiles, tiles.collect_tiles)


PATCHES = Kind(
    usual(
        {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, 3, CLIP, do_convert_rgb=True,
        default_to_square=False, patch_size=14, temporal_patch_size=2, merge_size=2,
        min_pixels=None, max_pixels=None,
    ),
    tiles.prepare_grid,
    tiles.collect_patches,
)  # fmt: skip
# image_processor_type → what it does.
KINDS: dict[str, Kind] = {
    "BitImageProcessor": Kind(shortest_and_crop(224)),
    "BlipImageProcessor": Kind(usual(square(384), 3, CLIP, do_convert_rgb=True)),
    "CLIPImageProcessor": Kind(shortest_and_crop(224)),
    "DeiTImageProcessor": Kind(
        usual(square(256), 3, STANDARD, do_center_crop=True, crop_size=square(224))
    ),
    "Gemma3ImageProcessor": Kind(usual(square(224), 2, STANDARD, do_convert_rgb=True)),
    "Idefics3ImageProcessor": of_tiles(),
    "Qwen2VLImageProcessor": PATCHES,
    "Qwen2_5_VLImageProcessor": PATCHES,
    "SmolVLMImageProcessor": of_tiles(),
    "ViltImageProcessor": Kind(
        usual(
            {"shortest_edge": 384},
            3,
            STANDARD,
            default_to_square=False,
            size_divisor=32,
            do_pad=True,
        ),
        tiles.prepare_divisible,
        tiles.collect_padded,
    ),
    "SiglipImageProcessor": Kind(
        usual(square(224), 3, STANDARD, default_to_square=False, do_convert_rgb=True)
    ),
    "ViTImageProcessor": Kind(usual(square(224), 2, STANDARD)),
}
# The kind of a model whose files name none.
OF_MODELS = {
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "vit": "ViTImageProcessor",
}


def kind_of(name: str) -> str:
    """The name in `KINDS` of an `image_processor_type`, or of what it was called before."""
    plain = name.removesuffix("Fast").removesuffix("Pil")
    plain = plain.removesuffix("FeatureExtractor") + (
        "ImageProcessor" if plain.endswith("FeatureExtractor") else ""
    )
    if plain not in KINDS:
        raise ConfigError(
            f"image_processor_type={name!r} is not known{nearest(plain, KINDS)}; known: "
            + ", ".join(KINDS)
        )
    return plain


class ImageProcessor:
    """Images → `pixel_values`. The options are attributes, named as in preprocessor_config.json."""

    def __init__(self, name: str = "ViTImageProcessor", **values: Any) -> None:
        """`values`: options; ConfigError for one that this kind does not act on."""
        self.name = kind_of(name)
        self.kind = KINDS[self.name]
        self.options: dict[str, Any] = {}
        self.options = self._merged(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "options":
            raise AttributeError(name)
        try:
            return self.options[name]
        except KeyError:
            raise AttributeError(
                f"{self.name} has no option {name!r}{nearest(name, self.options)}"
            ) from None

    def __repr__(self) -> str:
        return f"{self.name}({json.dumps(self.to_dict(), sort_keys=True)})"

    def _merged(self, values: Mapping[str, Any]) -> dict[str, Any]:
        known = {**COMMON, **self.kind.defaults, **self.options}
        for key in values:
            if key not in known and key not in INERT and values[key] not in (None, False):
                raise ConfigError(
                    f"{self.name} does not act on {key}={values[key]!r}{nearest(key, known)}"
                )
        given = {k: v for k, v in values.items() if k in known and v is not None}
        merged = {**known, **given}
        for key in SIZES:
            if merged[key] is not None:
                square = bool(merged["default_to_square"]) or key != "size"
                merged[key] = steps.size_of(merged[key], square, key)
        for need, parts in (
            ("do_resize", ("size",)),
            ("do_center_crop", ("crop_size",)),
            ("do_rescale", ("rescale_factor",)),
            ("do_normalize", ("image_mean", "image_std")),
        ):
            for part in parts:
                if merged[need] and merged[part] is None:
                    raise ConfigError(f"{self.name}: {need} needs {part}")
        if merged["do_center_crop"] and set(merged["crop_size"]) != {"height", "width"}:
            raise ConfigError(f"crop_size={merged['crop_size']!r} must give height and width")
        return merged

    def __call__(
        self, images: Any, return_tensors: str | None = None, **overrides: Any
    ) -> Encoding:
        """`pixel_values` of an image or several: all that `load_image` takes.

        Images from files are turned by their EXIF data and made RGB; those of Pillow's and arrays
        are taken as they are. `return_tensors`: "pt", "np", or None for a list of arrays.
        `overrides`: options for this call.
        """
        return as_tensors(self.read(images, **overrides)[0], return_tensors)

    def shaped(self, width: int, height: int) -> Prepared:
        """What an image of this size becomes, without its pixels."""
        blank = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (height, width, 3))
        return self.kind.prepare(blank, Options(**self.options), "the image")

    def read(
        self, images: Any, names: Sequence[str] | None = None, **overrides: Any
    ) -> tuple[dict[str, Any], list[Prepared]]:
        """The columns of a call, and what is known of each image. Lists within the list of
        `images` are those of one text each; `names` are what errors call the images."""
        options = Options(**(self._merged(overrides) if overrides else self.options))
        several = images if not is_one(images) else [images]
        rows = [image for one in several for image in (one if not is_one(one) else [one])]
        if not rows:
            raise DataError("there is no image: the list is empty")
        nested = not all(is_one(one) for one in several)
        counts = [1 if is_one(one) else len(one) for one in several]
        options.groups = counts if nested else [len(rows)]
        if names is None:
            names = [f"image {i}" for i in range(len(rows))] if len(rows) > 1 else ["the image"]
        prepared = [
            self.kind.prepare(self.pixels(image, options, name), options, name)
            for image, name in zip(rows, names)
        ]
        arrays = [
            [self.numbers(tile, options, name) for tile in one.tiles]
            for one, name in zip(prepared, names)
        ]
        return self.kind.collect(arrays, prepared, options), prepared

    def pixels(self, image: Any, options: Options, name: str) -> Pixels:
        """An image as pixels [H, W, channels], in colours where the options or the mean ask so."""
        if not is_pillow(image) and not is_array(image):
            image = load_image(image, name)
        pixels = pixels_of(image, name, options.input_data_format)
        convert = options.do_convert_rgb
        if convert is None:
            mean = options.image_mean
            three = options.do_normalize and isinstance(mean, Sequence) and len(mean) == 3
            convert = three and (pixels.shape[-1] != 3 or getattr(image, "mode", "RGB") != "RGB")
        return as_rgb(image, pixels, name) if convert else pixels

    def numbers(self, tile: Pixels, options: Options, name: str) -> np.ndarray:
        """Pixels [H, W, channels] as numbers [channels, H, W]."""
        if options.do_rescale and tile.dtype.kind == "f" and float(np.abs(tile).max()) <= 1:
            raise ConfigError(
                f"{name} holds floats from 0 to 1: it is rescaled already, pass do_rescale=False"
            )
        return steps.numbers(
            tile,
            options.rescale_factor if options.do_rescale else None,
            options.image_mean if options.do_normalize else None,
            options.image_std if options.do_normalize else None,
            name,
        )

    def to_dict(self) -> dict[str, Any]:
        """The keys of preprocessor_config.json."""
        said = {k: v for k, v in self.options.items() if v is not None}
        said.pop("default_to_square", None)
        return {**said, "image_processor_type": self.name}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")


def as_tensors(found: dict[str, Any], kind: str | None) -> Encoding:
    """Columns as they are, or as one tensor each ("pt", "np")."""
    if kind is None:
        return Encoding(found)
    if kind not in ("pt", "np"):
        raise ConfigError(f"return_tensors={kind!r}; 'pt' or 'np'")
    made: dict[str, Any] = {}
    for key, rows in found.items():
        if isinstance(rows, list):
            shapes = {np.shape(row) for row in rows}
            if len(shapes) > 1:
                raise ConfigError(
                    f"{key} of {sorted(shapes)} are no tensor: resize to one size (do_resize, "
                    "do_center_crop) or pass do_pad=True"
                )
            rows = np.stack(rows)
        made[key] = np.ascontiguousarray(rows)
    if kind == "np":
        return Encoding(made)
    import torch

    return Encoding({key: torch.from_numpy(rows) for key, rows in made.items()})


class AutoImageProcessor:
    """`AutoImageProcessor.from_pretrained(name)` gives an `ImageProcessor`."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> ImageProcessor:
        """Read preprocessor_config.json of a folder or Hub id; `options` replace what it says, or
        are those of `hub.resolve` (revision, token …)."""
        known = {*COMMON, *(key for kind in KINDS.values() for key in kind.defaults)}
        own = {k: v for k, v in options.items() if k in known}
        where = {k: v for k, v in options.items() if k not in known}
        files = hub.resolve(name_or_path, want=("config", "processor"), **where)
        values: dict[str, Any] = {}
        if FILE in files.files:
            values = files.json(FILE)
        elif PROCESSOR_FILE in files.files:
            values = files.json(PROCESSOR_FILE).get("image_processor") or {}
        if not values:
            raise CheckpointError(f"{name_or_path}: there is no {FILE}")
        name = values.get("image_processor_type") or values.get("feature_extractor_type")
        if name is None and "config.json" in files.files:
            name = OF_MODELS.get(files.json("config.json").get("model_type", ""))
        if name is None:
            raise CheckpointError(f"{name_or_path}: {FILE} has no image_processor_type")
        if str(name).endswith("FeatureExtractor") and "sampling_rate" in values:
            raise ConfigError(f"{name_or_path}: {FILE} is of sound, not of images")
        return ImageProcessor(str(name), **{**values, **own})
