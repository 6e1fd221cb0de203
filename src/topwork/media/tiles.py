"""Images for models that read them in texts: of any size as patches, in tiles, or padded."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from topwork.errors import ConfigError, DataError
from topwork.media import image_steps as steps
from topwork.media.image_steps import Prepared
from topwork.media.images import Pixels

Options = SimpleNamespace
LARGEST_SIDE = 4096  # of an image in tiles
VILT_RATIO = 1333 / 800  # the longest edge to the shortest


def sides(pixels: Pixels) -> tuple[int, int]:
    """Height and width."""
    return pixels.shape[0], pixels.shape[1]


# -- Qwen2-VL: patches of images of any size -------------------------------------------------------


def smart_size(height: int, width: int, step: int, least: int, most: int) -> tuple[int, int]:
    """Height and width as multiples of `step`, near the image's own proportions, with between
    `least` and `most` pixels (arXiv:2409.12191)."""
    both = (height, width)
    found = [round(side / step) * step for side in both]
    if found[0] * found[1] > most:
        shrink = math.sqrt(height * width / most)
        found = [max(step, math.floor(side / shrink / step) * step) for side in both]
    elif found[0] * found[1] < least:
        grow = math.sqrt(least / (height * width))
        found = [math.ceil(side * grow / step) * step for side in both]
    return found[0], found[1]


def prepare_grid(pixels: Pixels, options: Options, name: str) -> Prepared:
    """One image whose sides are multiples of a merged square of patches; `rows` and `cols` of
    those."""
    high, wide = pixels.shape[:2]
    if max(high, wide) > 200 * min(high, wide):
        raise DataError(f"{name}: {wide} x {high} pixels are more than 200 times as long as wide")
    step = options.patch_size * options.merge_size
    if options.do_resize:
        size = options.size
        least = options.min_pixels or size.get("shortest_edge", size.get("min_pixels"))
        most = options.max_pixels or size.get("longest_edge", size.get("max_pixels"))
        if least is None or most is None:
            raise ConfigError(f"size={size!r} must give shortest_edge and longest_edge, in pixels²")
        height, width = smart_size(high, wide, step, least, most)
        pixels = steps.resized(pixels, height, width, options.resample, name)
    elif high % step or wide % step:
        raise DataError(f"{name}: {wide} x {high} pixels are no multiples of {step}; resize it")
    down, across = pixels.shape[0] // options.patch_size, pixels.shape[1] // options.patch_size
    return Prepared([pixels], {"rows": down, "cols": across})


def collect_patches(
    arrays: list[list[np.ndarray]], prepared: list[Prepared], options: Options
) -> dict[str, Any]:
    """`pixel_values` [patches, numbers], square after merged square, and `image_grid_thw`."""
    patch, merge, frames = options.patch_size, options.merge_size, options.temporal_patch_size
    rows, grids = [], []
    for array in (tile for tiles in arrays for tile in tiles):
        channels, high, wide = array.shape
        down, across = high // patch, wide // patch
        cut = array.astype(np.float32, copy=False).reshape(
            channels, down // merge, merge, patch, across // merge, merge, patch
        )
        cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]  # … C, frame, patch, patch
        cut = np.broadcast_to(cut, (*cut.shape[:5], frames, patch, patch))
        rows.append(cut.reshape(down * across, -1))
        grids.append([1, down, across])
    return {
        "pixel_values": np.concatenate(rows),
        "image_grid_thw": np.array(grids, dtype=np.int64),
    }


# -- Idefics 3: tiles ------------------------------------------------------------------------------


def by_longest(height: int, width: int, longest: int) -> tuple[int, int]:
    """The longest side as long as that, the other even; no side above 4096."""
    ratio = width / height
    if width >= height:
        wide, high = longest, int(longest / ratio)
        high += high % 2
    else:
        high, wide = longest, int(longest * ratio)
        wide += wide % 2
    high, wide = max(high, 1), max(wide, 1)
    ratio = wide / high
    if wide >= high and wide > LARGEST_SIDE:
        wide, high = LARGEST_SIDE, int(LARGEST_SIDE / ratio)
    elif high > wide and high > LARGEST_SIDE:
        high, wide = LARGEST_SIDE, int(LARGEST_SIDE * ratio)
    return max(high, 1), max(wide, 1)


def to_tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """The size in whole tiles that keeps the proportions best."""

    def up(length: float) -> int:
        return math.ceil(length / side) * side

    ratio = width / height
    if width >= height:
        return up(int(up(width) / ratio)), up(width)
    return up(height), up(int(up(height) * ratio))


def prepare_tiles(pixels: Pixels, options: Options, name: str) -> Prepared:
    """The image's tiles row by row, then the whole image as one tile; `rows` and `cols` of them
    are 0 where there is only the whole."""
    side = options.max_image_size["longest_edge"]

    def resized(pixels: Pixels, height: int, width: int) -> Pixels:
        return steps.resized(pixels, height, width, options.resample, name)

    if options.do_resize:
        size = options.size
        if "longest_edge" in size:
            pixels = resized(pixels, *by_longest(*sides(pixels), size["longest_edge"]))
        else:
            pixels = resized(pixels, *steps.fitted(*sides(pixels), size))
    if not options.do_image_splitting:
        return Prepared([resized(pixels, side, side)], {"rows": 0, "cols": 0})
    pixels = resized(pixels, *to_tiles(*sides(pixels), side))
    rows, cols = pixels.shape[0] // side, pixels.shape[1] // side
    if rows == cols == 1:
        return Prepared([pixels], {"rows": 0, "cols": 0})
    tiles = [
        pixels[top : top + side, left : left + side]
        for top in range(0, rows * side, side)
        for left in range(0, cols * side, side)
    ]
    return Prepared([*tiles, resized(pixels, side, side)], {"rows": rows, "cols": cols})


def collect_tiles(
    arrays: list[list[np.ndarray]], prepared: list[Prepared], options: Options
) -> dict[str, Any]:
    """`pixel_values` [texts, tiles, channels, H, W], zeros where a text has fewer tiles, and
    `pixel_attention_mask` [texts, tiles, H, W]."""
    texts, at = [], 0
    for count in options.groups:
        texts.append([tile for tiles in arrays[at : at + count] for tile in tiles])
        at += count
    every = [tile for tiles in texts for tile in tiles]
    channels = every[0].shape[0]
    high, wide = (max(tile.shape[axis] for tile in every) for axis in (1, 2))
    most = max(len(tiles) for tiles in texts)
    values = np.zeros((len(texts), most, channels, high, wide), dtype=np.float32)
    mask = np.zeros((len(texts), most, high, wide), dtype=np.int64)
    for i, tiles in enumerate(texts):
        for j, tile in enumerate(tiles):
            values[i, j, :, : tile.shape[1], : tile.shape[2]] = tile
            mask[i, j, : tile.shape[1], : tile.shape[2]] = 1
    return {"pixel_values": values, "pixel_attention_mask": mask}


# -- ViLT: padded ----------------------------------------------------------------------------------


def prepare_divisible(pixels: Pixels, options: Options, name: str) -> Prepared:
    """The shortest side as asked, the longest within 1333/800 of it, both multiples."""
    if options.do_resize:
        shortest, step = options.size.get("shortest_edge"), options.size_divisor
        if shortest is None:
            raise ConfigError(f"size={options.size!r} must give shortest_edge")
        longest = int(VILT_RATIO * shortest)
        high, wide = pixels.shape[:2]
        scale = shortest / min(high, wide)
        both = [shortest, scale * wide] if high < wide else [scale * high, shortest]
        if max(both) > longest:
            scale = longest / max(both)
            both = [scale * side for side in both]
        height, width = (int(side + 0.5) // step * step for side in both)
        pixels = steps.resized(pixels, height, width, options.resample, name)
    return Prepared([pixels])


def collect_padded(
    arrays: list[list[np.ndarray]], prepared: list[Prepared], options: Options
) -> dict[str, Any]:
    """`pixel_values` of one size, and `pixel_mask`, 0 where an image is padded."""
    rows = [tile for tiles in arrays for tile in tiles]
    if not options.do_pad:
        return {"pixel_values": rows}
    height, width = (max(row.shape[axis] for row in rows) for axis in (1, 2))
    ones = [np.ones((1, *row.shape[1:]), dtype=np.int64) for row in rows]
    return {
        "pixel_values": [steps.padded(row, height, width) for row in rows],
        "pixel_mask": [steps.padded(one, height, width)[0] for one in ones],
    }
