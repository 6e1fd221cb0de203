"""Image processors against transformers' own on Pillow: every size, shape and mode alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from topwork import AutoImageProcessor
from topwork.media import ImageProcessor
from topwork.media.image_processor import KINDS, prepare

PEERS = {
    "BitImageProcessor": transformers.BitImageProcessorPil,
    "BlipImageProcessor": transformers.BlipImageProcessorPil,
    "CLIPImageProcessor": transformers.CLIPImageProcessorPil,
    "DeiTImageProcessor": transformers.DeiTImageProcessorPil,
    "SiglipImageProcessor": transformers.SiglipImageProcessorPil,
    "ViTImageProcessor": transformers.ViTImageProcessorPil,
}
SIZES = [(224, 224), (1, 1), (1, 37), (40, 1), (30, 47), (47, 30), (223, 225), (301, 97), (64, 500)]
MODES = ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"]


def image(size, mode="RGB", seed=0):
    """Random pixels with structure: noise on a slope, so that filters show."""
    rng = np.random.default_rng(seed)
    wide, high = size
    slope = np.linspace(0, 160, wide)[None, :, None] + np.linspace(0, 60, high)[:, None, None]
    made = np.clip(slope + rng.integers(0, 60, (high, wide, 4)), 0, 255).astype(np.uint8)
    whole = Image.fromarray(made, "RGBA") if mode in ("RGBA", "LA") else Image.fromarray(
        made[..., :3]
    )  # fmt: skip
    return whole.convert(mode)


def check(ours, theirs, images, **options):
    found = ours(images, return_tensors="pt", **options).pixel_values
    wanted = theirs(images, return_tensors="pt", **options).pixel_values
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_the_usual_options_are_the_peers(name, tmp_path):
    ours, theirs = ImageProcessor(name), PEERS[name]()
    for size in SIZES:
        check(ours, theirs, image(size))
    check(ours, theirs, [image(size) for size in SIZES[:5]])
    theirs.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert again.options == ours.options
    again.save_pretrained(tmp_path / "ours")
    back = PEERS[name].from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in back.to_dict().items() if v is not None} == {
        k: v for k, v in theirs.to_dict().items() if v is not None
    }


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_colours_alike(mode):
    """Transparency is laid on white, palettes are looked up."""
    for size in ((30, 47), (1, 9)):
        for name in ("CLIPImageProcessor", "SiglipImageProcessor"):
            check(ImageProcessor(name), PEERS[name](), image(size, mode))
        # Where the files do not ask for colours, but the mean is of three: the peer fails.
        vit = PEERS["ViTImageProcessor"](do_convert_rgb=True)
        check(ImageProcessor("ViTImageProcessor"), vit, image(size, mode))


def test_a_palette_with_a_transparent_colour_is_laid_on_white():
    made = image((20, 20), "P")
    made.info["transparency"] = 3
    check(ImageProcessor("CLIPImageProcessor"), PEERS["CLIPImageProcessor"](), made)


OPTIONS = [
    {"size": 20},
    {"size": [12, 20]},
    {"size": {"height": 9, "width": 31}},
    {"size": {"shortest_edge": 24}},
    {"size": {"shortest_edge": 24, "longest_edge": 40}},
    {"size": {"max_height": 30, "max_width": 18}},
    {"do_resize": False},
    {"do_center_crop": True, "crop_size": 50},
    {"do_center_crop": True, "crop_size": {"height": 13, "width": 250}},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    {"do_pad": True, "pad_size": {"height": 900, "width": 900}, "do_center_crop": False},
    *({"resample": kind} for kind in range(6)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_acts_as_the_peers(options, tmp_path):
    for name in ("ViTImageProcessor", "CLIPImageProcessor"):
        theirs = PEERS[name](**options)
        theirs.save_pretrained(tmp_path)
        # As files spell it before the peer's software rewrites it.
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
        ours = AutoImageProcessor.from_pretrained(tmp_path)
        for size in ((50, 33), (33, 50), (24, 90), (17, 17)):
            check(ours, theirs, image(size))
            check(ImageProcessor(name), PEERS[name](), image(size), **options)


def test_arrays_and_tensors_are_images(tmp_path):
    ours, theirs = ImageProcessor("CLIPImageProcessor"), PEERS["CLIPImageProcessor"]()
    pixels = np.array(image((40, 31)))
    for given in (pixels, np.moveaxis(pixels, -1, 0), torch.from_numpy(pixels.copy())):
        check(ours, theirs, given)
    check(ours, theirs, np.stack([pixels, pixels[::-1]]))
    floats = pixels.astype(np.float32) / 255
    check(ours, theirs, floats, do_rescale=False)
    check(ours, theirs, floats, do_rescale=False, do_resize=False)
    alpha = np.concatenate([pixels, pixels[..., :1]], -1)
    check(ours, theirs, alpha)
    check(ours, theirs, alpha.astype(np.float32) / 255, do_rescale=False)
    gray = ImageProcessor("ViTImageProcessor", image_mean=[0.5], image_std=[0.5])
    check(gray, PEERS["ViTImageProcessor"](image_mean=[0.5], image_std=[0.5]), image((9, 8), "L"))


def test_files_are_turned_by_their_exif_data(tmp_path):
    for turn in range(1, 9):
        made = image((30, 47))
        exif = made.getexif()
        exif[0x0112] = turn
        made.save(tmp_path / "turned.png", exif=exif)
        path = str(tmp_path / "turned.png")
        check(ImageProcessor("ViTImageProcessor"), PEERS["ViTImageProcessor"](), path)


def test_files_of_older_software_load(tmp_path):
    """Other names of the type, a bare number for a size, no type at all."""
    want = ImageProcessor("CLIPImageProcessor")
    for values in (
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"size": 224},
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        assert AutoImageProcessor.from_pretrained(tmp_path).options == want.options
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"image_processor": {"image_processor_type": "CLIPImageProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert AutoImageProcessor.from_pretrained(tmp_path).options == want.options


def test_each_kind_of_the_usual_steps_has_its_peer():
    """Kinds with steps of their own, and Gemma 3's, stand in test_image_text_processor.py."""
    plain = {name for name, kind in KINDS.items() if kind.prepare is prepare}
    assert plain - {"Gemma3ImageProcessor"} == set(PEERS)
