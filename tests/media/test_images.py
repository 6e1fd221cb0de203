"""Images from everywhere, and what is refused: damaged, huge, empty, not an image at all."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from topwork import AutoImageProcessor
from topwork.errors import CheckpointError, ConfigError, DataError
from topwork.media import ImageProcessor, images, load_image
from topwork.media import image_steps as steps


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def test_an_image_comes_from_anything_that_holds_one(pixels, tmp_path):
    data = png(pixels)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    tensor = torch.from_numpy(pixels)
    given = [path, str(path), data, bytearray(data), io.BytesIO(data), address, {"bytes": data},
             {"bytes": None, "path": str(path)}, Image.fromarray(pixels), pixels, tensor,
             tensor.permute(2, 0, 1), pixels / 255]  # fmt: skip
    for source in given:
        found = load_image(source)
        assert found.mode == "RGB"
        assert np.abs(np.array(found).astype(int) - pixels).max() <= (source is given[-1])


def test_modes_become_rgb(pixels):
    for mode in ("L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "F"):
        gray = mode in ("I;16", "F")
        made = Image.fromarray(pixels[..., 0] if gray else pixels).convert(mode)
        assert load_image(made).mode == "RGB"


def huge(width, height):
    """The header of a PNG of this size, and next to nothing behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bad_sources(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = png(pixels)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    cut = tmp_path / "cut.png"
    cut.write_bytes(data[: len(data) // 2])
    return {
        "cannot read .*none.png: No such file": tmp_path / "none.png",
        "cannot read": tmp_path,
        r"photo 7 \(.*empty.png\) is empty: zero bytes": empty,
        r"photo 7 \(.*cut.png\): damaged": str(cut),
        "no image of a known format": b"not an image at all",
        "known format": eps,
        "20000 x 20000 pixels are more than the 150,000,000|exceeds limit": huge(20000, 20000),
        "13000 x 12000 pixels are more than the 150,000,000": huge(13000, 12000),
        "photo 7: damaged": huge(300, 300),
        "download it first": "https://example.org/cat.png",
        "data: address must be": "data:image/png,abc",
        "no base64": "data:image/png;base64,@@@",
        "photo 7 is int; an image is a path": 5,
        r'needs "bytes" or "path"': {"url": "x"},
        "no axis of 1, 3 or 4 channels": np.zeros((5, 5, 2), np.uint8),
        "two or three axes": np.zeros((1, 2, 5, 5, 3), np.uint8),
        "no pixels: 0 x 5": np.zeros((5, 0, 3), np.uint8),
        "values from -1": np.full((4, 4, 3), -1.0),
        "values from 0.5 to 3": np.array([[0.5, 3.0]]),
        "values from nan": np.full((4, 4, 3), np.nan),
        "array of <U1|array of object": np.array([["a", "b"]]),
    }


def test_what_is_no_image_is_refused_by_name(tmp_path):
    for words, source in bad_sources(tmp_path).items():
        with pytest.raises(DataError, match=words) as caught:
            load_image(source, "photo 7")
        assert "photo 7" in str(caught.value)


def test_the_size_is_seen_before_the_pixels_are_decoded(monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decode)
    with pytest.raises(DataError, match="13000 x 12000"):
        load_image(huge(13000, 12000))


def test_a_batch_names_the_image_that_is_wrong(pixels):
    processor = ImageProcessor("CLIPImageProcessor")
    with pytest.raises(DataError, match="image 1 is no image"):
        processor([pixels, b"no"])
    with pytest.raises(DataError, match="the list is empty"):
        processor([])
    with pytest.raises(DataError, match="resized to 22400000 x 224: crop it first"):
        processor(np.zeros((2, 200_000, 3), np.uint8))


def test_images_of_several_sizes_are_no_tensor_unless_padded(pixels):
    processor = ImageProcessor("ViTImageProcessor", do_resize=False)
    other = pixels[:5]
    assert [len(row[0]) for row in processor([pixels, other]).pixel_values] == [7, 5]
    with pytest.raises(ConfigError, match="pass do_pad=True"):
        processor([pixels, other], return_tensors="pt")
    both = processor([pixels, other], return_tensors="np", do_pad=True).pixel_values
    assert both.shape == (2, 3, 7, 5)
    assert not both[1, :, 5:].any()
    with pytest.raises(ConfigError, match=r"image 0: 5 x 7 pixels do not fit into 6 x 6"):
        processor([pixels], do_pad=True, pad_size=6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_centre_crop": True}, "nearest: 'do_center_crop'"),
        ({"size": {"width": 3}}, "give height and width"),
        ({"size": 0}, "size=0"),
        ({"size": "large"}, "size='large'"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "must give height and width"),
        ({"do_center_crop": True}, "do_center_crop needs crop_size"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ImageProcessor("ViTImageProcessor", **options)


def test_calls_that_cannot_be_meant_are_refused(pixels):
    processor = ImageProcessor("ViTImageProcessor")
    with pytest.raises(ConfigError, match="pass do_rescale=False"):
        processor(pixels / 255)
    with pytest.raises(ConfigError, match="resample=9"):
        processor(pixels, resample=9)
    with pytest.raises(ConfigError, match="does not say how large"):
        processor(pixels, size={"longest_edge": 5})
    with pytest.raises(ConfigError, match="1 channels, but image_mean"):
        processor(pixels[..., 0], do_convert_rgb=False)
    with pytest.raises(ConfigError, match="return_tensors='tf'"):
        processor(pixels, return_tensors="tf")
    with pytest.raises(AttributeError, match="nearest: 'image_mean'"):
        _ = processor.image_means


def test_files_that_do_not_say_what_to_do_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no preprocessor_config"):
        AutoImageProcessor.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": 3}')
    with pytest.raises(CheckpointError, match="no image_processor_type"):
        AutoImageProcessor.from_pretrained(tmp_path)
    path.write_text('{"image_processor_type": "CLIPImageProcesor"}')
    with pytest.raises(ConfigError, match="nearest: 'CLIPImageProcessor'"):
        AutoImageProcessor.from_pretrained(tmp_path)
    sound = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 16000}
    path.write_text(json.dumps(sound))
    with pytest.raises(ConfigError, match="of sound"):
        AutoImageProcessor.from_pretrained(tmp_path)


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"pip install 'topwork\[images\]'"):
        load_image(b"x")


def test_numbers_are_looked_up_as_they_are_computed():
    """(v · scale - mean) / std, by the formula."""
    made = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    mean, std = [0.1, 0.5, 0.3], [0.2, 0.4, 0.6]
    found = steps.numbers(made, 1 / 255, mean, std)
    wanted = (made / 255 - mean) / std
    np.testing.assert_allclose(found, np.moveaxis(wanted, -1, 0), rtol=1e-5, atol=1e-6)
    floats = steps.numbers(made.astype(np.float32), 1 / 255, mean, std)
    assert np.array_equal(floats, found)


def test_the_largest_image_is_one_that_fits():
    assert images.LARGEST * 3 < 2**29
