"""What is done to the pixels of an image: resize, crop, pad, and make numbers of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from topwork.errors import ConfigError, DataError
from topwork.media.images import LARGEST, Pixels, as_uint8, pillow

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
SIZES = (
    {"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"longest_edge"},
    {"max_height", "max_width"}, {"min_pixels", "max_pixels"},
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """One image as tiles of pixels [H, W, channels], and what else is known about it."""

    tiles: list[Pixels]
    facts: dict[str, Any] = field(default_factory=dict)


def size_of(value: Any, square: bool = True, option: str = "size") -> dict[str, int]:
    """The option `size` in its full spelling.

    A number is both sides if `square`, else the shortest edge; a pair is [height, width].
    """
    if isinstance(value, bool) or value is None:
        raise ConfigError(f"{option}={value!r} is no size")
    full = value
    if isinstance(value, (int, float)):
        full = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        full = {"height": value[0], "width": value[1]}
    if isinstance(full, Mapping):
        found = {k: int(v) for k, v in full.items() if v is not None}
        if set(found) in SIZES and min(found.values()) > 0:
            return found
    raise ConfigError(
        f"{option}={value!r}: give height and width, shortest_edge (and longest_edge), or "
        "max_height and max_width, in pixels"
    )


def fitted(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width that an image gets by `size`; edges keep its proportions."""
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return int(height * scale), int(width * scale)
    if "shortest_edge" not in size:
        raise ConfigError(f"size={dict(size)!r} does not say how large an image becomes")
    short, long = sorted((height, width))
    target, limit = size["shortest_edge"], size.get("longest_edge")
    exact: float = target
    if limit is not None and long / short * target > limit:
        exact = limit * short / long
        target = round(exact)
    if short == target:
        return height, width
    other = int(exact * long / short)
    return (target, other) if height <= width else (other, target)


def resized(pixels: Pixels, height: int, width: int, resample: int | None, name: str) -> Pixels:
    """`pixels` at another size, through Pillow in 8 bits; floats from 0 to 1 come back as such."""
    if min(height, width) < 1 or height * width > LARGEST:
        raise DataError(
            f"{name}: {pixels.shape[1]} x {pixels.shape[0]} pixels would be resized to {width} x "
            f"{height}: crop it first"
        )
    if pixels.strides[:2] == (0, 0):  # one colour, which `ImageProcessor.shaped` measures with
        return np.broadcast_to(pixels[:1, :1], (height, width, pixels.shape[2]))
    image, _ = pillow()
    whole = as_uint8(pixels, name)
    shared = pixels.dtype.kind == "f" and not np.allclose(pixels, np.trunc(pixels))
    given = image.fromarray(np.ascontiguousarray(whole[..., 0] if whole.shape[2] == 1 else whole))
    kind = 2 if resample is None else int(resample)
    if kind not in RESAMPLING:
        known = ", ".join(f"{k} ({v})" for k, v in RESAMPLING.items())
        raise ConfigError(f"resample={resample!r} is not known: {known}")
    found = np.array(given.resize((width, height), resample=kind))
    found = found[..., None] if found.ndim == 2 else found
    return (found.astype(np.float64) / 255).astype(np.float32) if shared else found


def centre_cropped(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle of an image; what lies outside of it is black."""
    high, wide = pixels.shape[:2]
    # Where the crop begins: with black around, half of it, rounded up, comes first.
    top, left = (high - height) // 2, (wide - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    up, down = _around(high, height)
    before, after = _around(wide, width)
    pixels = np.pad(pixels, ((up, down), (before, after), (0, 0)))
    top, left = top + up, left + before
    return pixels[max(0, top) : top + height, max(0, left) : left + width]


def _around(there: int, wanted: int) -> tuple[int, int]:
    missing = max(0, wanted - there)
    return (missing + 1) // 2, missing // 2


def padded(array: np.ndarray, height: int, width: int, name: str = "the image") -> np.ndarray:
    """[channels, H, W] with zeros to the right and below, up to this size."""
    high, wide = array.shape[1:]
    if high > height or wide > width:
        raise ConfigError(f"{name}: {wide} x {high} pixels do not fit into {width} x {height}")
    return np.pad(array, ((0, 0), (0, height - high), (0, width - wide)))


def numbers(
    pixels: Pixels,
    scale: float | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    name: str = "the image",
) -> np.ndarray:
    """(pixels · scale - mean) / std as [channels, H, W]; None leaves that part out.

    Of 8 bits each value is computed once for every channel, and looked up.
    """
    channels = pixels.shape[2]
    means, stds = (_each(v, channels, n, name) for v, n in ((mean, "mean"), (std, "std")))

    def number(values: np.ndarray, channel: int) -> np.ndarray:
        if scale is not None:
            values = (values.astype(np.float64) * scale).astype(np.float32)
        if means is not None and stds is not None:
            values = values if values.dtype.kind == "f" else values.astype(np.float32)
            kind = values.dtype
            values = (values - kind.type(means[channel])) / kind.type(stds[channel])
        return values

    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    if pixels.dtype != np.uint8:
        return np.stack([number(plane, c) for c, plane in enumerate(planes)])
    every = np.arange(256, dtype=np.uint8)
    return np.stack([number(every, c)[plane] for c, plane in enumerate(planes)])


def _each(
    value: float | Sequence[float] | None, channels: int, what: str, name: str
) -> list[float] | None:
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return [float(value)] * channels
    if len(value) != channels:
        raise ConfigError(
            f"{name} has {channels} channels, but image_{what}={list(value)!r} is for "
            f"{len(value)}; pass do_convert_rgb=True"
        )
    return [float(v) for v in value]
