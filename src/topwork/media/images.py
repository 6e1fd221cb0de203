"""Images from files, bytes, data: addresses and arrays, as Pillow's images or as pixels."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from topwork.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = np.ndarray  # [H, W, channels], uint8 from 0 to 255, or floats

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF: turned by a quarter
LARGEST = 150_000_000  # pixels of one image; a header may claim anything
# What is opened: no format that is a program (EPS) or a stub of another one.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF",
           "JPEG2000")  # fmt: skip


def pillow() -> Any:
    """The library that decodes and resizes; ConfigError where it is not installed."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ConfigError("images need Pillow: pip install 'topwork[images]'") from error
    return Image, ImageOps


def load_image(source: Any, name: str = "the image") -> Image:
    """`source` as an RGB image of Pillow's, turned as its EXIF data says.

    A path, the bytes of a file or an open one, a data: address, an image of Pillow's, an array or
    tensor of pixels, or a mapping with "bytes" or "path", as the rows of `datasets` have it.
    DataError, with `name`, for what is no image, empty, damaged or of more than 150 million
    pixels, which is seen before they are decoded.
    """
    _, ops = pillow()
    image = _opened(source, name)
    try:
        return ops.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name}: damaged image: {error}") from error


def image_size(source: Any, name: str, channels: str | None = None) -> tuple[int, int]:
    """Width and height of what `load_image` takes, by its header: no pixel is decoded.

    DataError as there; damage behind the header is not seen. `channels` as in `pixels_of`.
    """
    if is_array(source):
        shape = pixels_of(source, name, channels).shape
        return int(shape[1]), int(shape[0])
    if is_pillow(source):
        _check_size(source.size, name)
        return source.size
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or source
    if isinstance(source, (str, Path)) and not str(source).startswith("data:"):
        path = Path(source).expanduser()
        try:
            with path.open("rb") as file:
                return _turned(_decoded(file, f"{name} ({path})", decode=False), name)
        except OSError:
            pass  # `_read` has the words for it
    return _turned(_opened(source, name, decode=False), name)


def _turned(opened: Image, name: str) -> tuple[int, int]:
    """Width and height once the image is turned as its EXIF data says."""
    image, _ = pillow()
    try:
        # The class's own: that of PNG files would decode the pixels.
        turned = image.Image.getexif(opened).get(ORIENTATION) in SIDEWAYS
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name}: damaged image: {error}") from error
    wide, high = opened.size
    return (high, wide) if turned else (wide, high)


def image_facts(source: Any) -> bytes:
    """What tells an image from others, without reading files: a file's name and length, or a digest
    of what is held in memory."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, (str, Path)) and not str(source).startswith("data:"):
        path = Path(source).expanduser()
        return f"{path.name} {path.stat().st_size}".encode()
    if isinstance(source, (str, Path)):
        source = str(source).encode()
    if is_pillow(source) and getattr(source, "filename", ""):
        return f"{Path(source.filename).name} {source.size}".encode()
    if is_pillow(source):
        source = source.tobytes()
    elif is_array(source):
        source = np.ascontiguousarray(pixels_of(source, "the image")).tobytes()
    return hashlib.sha256(source).digest() if isinstance(source, (bytes, bytearray)) else b""


def is_pillow(source: Any) -> bool:
    """Whether `source` is an image of Pillow's, told without loading it."""
    return any(kind.__module__ == "PIL.Image" for kind in type(source).__mro__)


def is_array(source: Any) -> bool:
    """Whether `source` is an array or a tensor."""
    return hasattr(source, "shape") and hasattr(source, "__array__")


def is_one(source: Any) -> bool:
    """Whether `source` is a single image rather than a batch of them."""
    if is_array(source):
        return len(source.shape) < 4
    return not isinstance(source, (list, tuple))


def _opened(source: Any, name: str, decode: bool = True) -> Image:
    if is_pillow(source):
        _check_size(source.size, name)
        return source
    if is_array(source):
        image, _ = pillow()
        pixels = as_uint8(pixels_of(source, name), name)
        return image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if isinstance(source, Mapping):
        found = source.get("bytes") or source.get("path")
        if not found:
            raise DataError(f'{name}: a mapping needs "bytes" or "path", got {sorted(source)}')
        return _opened(found, name, decode)
    if isinstance(source, (bytes, bytearray)):
        return _decoded(bytes(source), name, decode)
    if hasattr(source, "read"):
        begin = source.tell() if not decode else 0
        found = _decoded(source.read(), name, decode)
        if not decode:
            source.seek(begin)
        return found
    if isinstance(source, (str, Path)):
        return _decoded(*_read(source, name), decode)
    raise DataError(
        f"{name} is {type(source).__name__}; an image is a path, bytes, a data: address, an image "
        "of Pillow's or an array"
    )


def _read(source: str | Path, name: str) -> tuple[bytes, str]:
    """The bytes of a file or a data: address, and what to call it."""
    text = str(source)
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise DataError(f"{name}: a data: address must be data:image/…;base64,…")
        try:
            return base64.b64decode(body, validate=True), name
        except binascii.Error as error:
            raise DataError(f"{name}: the data: address is no base64: {error}") from error
    if text.startswith(("http://", "https://")):
        raise DataError(f"{name}: {text} is an address; download it first and pass the file")
    path = Path(text).expanduser()
    try:
        return path.read_bytes(), f"{name} ({path})"
    except OSError as error:
        shown = text if len(text) < 200 else text[:200] + "…"
        raise DataError(f"{name}: cannot read {shown}: {error.strerror}") from error


def _decoded(data: bytes | BinaryIO, name: str, decode: bool = True) -> Image:
    """The image in `data`, decoded whole unless its header is enough."""
    image, _ = pillow()
    if not data:
        raise DataError(f"{name} is empty: zero bytes")
    try:
        with warnings.catch_warnings():  # of sizes: they are checked here
            warnings.simplefilter("ignore", image.DecompressionBombWarning)
            image.init()
            kinds = [kind for kind in FORMATS if kind in image.OPEN]
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            opened = image.open(file, formats=kinds)
        _check_size(opened.size, name)
        if decode:
            opened.load()
    except image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}; at most {LARGEST:,} are read") from error
    except image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS).lower()
        raise DataError(f"{name} is no image of a known format ({known})") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise DataError(f"{name}: damaged image: {error}") from error
    return opened


def _check_size(size: tuple[int, int], name: str) -> None:
    if min(size) < 1:
        raise DataError(f"{name} has no pixels: {size[0]} x {size[1]}")
    if size[0] * size[1] > LARGEST:
        raise DataError(
            f"{name}: {size[0]} x {size[1]} pixels are more than the {LARGEST:,} that are read; "
            "make it smaller first"
        )


# -- pixels ----------------------------------------------------------------------------------------


def pixels_of(source: Any, name: str, channels: str | None = None) -> Pixels:
    """An image of Pillow's or an array as pixels [H, W, channels].

    Arrays are [H, W], or have 1, 3 or 4 channels in front or behind (`channels`: "channels_first"
    or "channels_last"; by default the axis that fits, the first where both do).
    """
    if is_pillow(source):
        _check_size(source.size, name)
        found = np.array(source)
    else:
        if hasattr(source, "detach"):
            source = source.detach().cpu()
            source = source.float() if str(source.dtype) == "torch.bfloat16" else source
        found = np.asarray(source)
    if found.dtype == bool:
        found = found.astype(np.uint8) * 255
    if found.dtype.kind not in "uif":
        raise DataError(f"{name} is an array of {found.dtype}, not of pixels")
    if found.ndim == 2:
        return _sized(found[..., None], name)
    if found.ndim != 3:
        raise DataError(f"{name} has the shape {found.shape}; an image has two or three axes")
    first = found.shape[0] in (1, 3, 4)
    if is_pillow(source) or channels == "channels_last":
        first = False
    elif channels == "channels_first":
        first = True
    elif not first and found.shape[2] not in (1, 3, 4):
        raise DataError(f"{name} has the shape {found.shape}: no axis of 1, 3 or 4 channels")
    return _sized(np.moveaxis(found, 0, -1) if first else found, name)


def _sized(pixels: Pixels, name: str) -> Pixels:
    _check_size((pixels.shape[1], pixels.shape[0]), name)
    return pixels


def as_uint8(pixels: Pixels, name: str) -> Pixels:
    """Whole numbers from 0 to 255; floats from 0 to 1 are spread over them."""
    if pixels.dtype == np.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    whole = pixels.dtype.kind in "ui" or np.allclose(pixels, np.trunc(pixels))
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > (255 if whole else 1):
        raise DataError(
            f"{name} has values from {low:g} to {high:g}; pixels are whole numbers from 0 to 255, "
            "or floats from 0 to 1"
        )
    if not whole:
        pixels = (pixels.astype(np.float64) * 255).astype(np.float32)
    return pixels.astype(np.uint8)


def as_rgb(source: Any, pixels: Pixels | None, name: str) -> Pixels:
    """Three channels; what is transparent is laid on white. `source`: Pillow's image, if it is."""
    if is_pillow(source):
        image, _ = pillow()
        if "A" in source.getbands() or source.info.get("transparency") is not None:
            layer = source.convert("RGBA")
            white = image.new("RGBA", layer.size, (255, 255, 255, 255))
            source = image.alpha_composite(white, layer)
        return np.array(source.convert("RGB"))
    assert pixels is not None
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, -1)
    if pixels.shape[-1] == 3:
        return pixels
    whole = pixels.dtype.kind in "ui"
    if not whole and (pixels.min() < 0 or pixels.max() > 1):
        raise DataError(f"{name}: floats with transparency must lie between 0 and 1")
    white = 255 if whole else 1.0
    share = pixels[..., 3:] / white
    laid = share * pixels[..., :3] + (1 - share) * white
    return (np.round(laid) if whole else laid).astype(pixels.dtype)
