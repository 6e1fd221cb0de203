"""Image pipelines against transformers' on tiny random models."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors, trainers

from topwork import AutoModel, AutoModelForImageClassification, LoraConfig, get_peft_model, pipeline
from topwork.errors import CheckpointError, ConfigError, DataError
from topwork.media import ImageProcessor
from topwork.text import Tokenizer

LABELS = ["a cat", "two dogs", "rain on a hill"]
LAYERS = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
VISION = {**LAYERS, "image_size": 16, "patch_size": 4}


def picture(size, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(made, "RGBA").convert(mode)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images as they come: a file turned on its side, transparent, gray, a palette."""
    home = tmp_path_factory.mktemp("pictures")
    turned = picture((20, 31))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(home / "turned.jpg", exif=exif)
    return [str(home / "turned.jpg"), picture((18, 40), "RGBA", 1), picture((9, 9), "L", 2),
            picture((30, 17), "P", 3)]  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizer")
    core = Core(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<start>", "<end>"]
    sentences = [f"This is a photo of {label}." for label in LABELS]
    core.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>",
             "pad_token": "<end>"}  # fmt: skip
    Tokenizer(core, {**names, "model_max_length": 64}).save_pretrained(home)
    return home


def saved(home, family, maker, processor, **options):
    """A tiny random model in `home`, with its image processor."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **options)
    model = getattr(transformers, maker).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2))
    model.save_pretrained(home)
    processor.save_pretrained(home)
    return model


def classifier(home, **options):
    processor = transformers.ViTImageProcessorPil(size=16)
    names = {0: "cat", 1: "dog", 2: "hill", 3: "sea", 4: "sky", 5: "car"}
    config = {**VISION, "id2label": names, **options}
    return saved(home, "vit", "AutoModelForImageClassification", processor, **config), processor


def alike(found, wanted):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted):
        if isinstance(theirs, list):
            alike(ours, theirs)
        else:
            assert set(ours) == set(theirs)
            assert ours["label"] == theirs["label"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


@pytest.mark.parametrize(
    "problem", [None, "multi_label_classification", "single_label_classification"]
)
def test_image_classification_equals_the_peer(problem, pictures, tmp_path):
    model, processor = classifier(tmp_path, problem_type=problem)
    theirs = transformers.pipeline("image-classification", model=model, image_processor=processor)
    ours = pipeline("image-classification", model=tmp_path)
    alike(ours(pictures), theirs(pictures))
    alike([ours(pictures[0])], [theirs(pictures[0])])
    for options in ({"top_k": 2}, {"top_k": 9}, {"function_to_apply": "none"},
                    {"function_to_apply": "sigmoid", "top_k": 1}):  # fmt: skip
        alike(ours(pictures, **options), theirs(pictures, **options))
    assert len(ours(pictures[0])) == 5
    assert len(ours(pictures[0], top_k=None)) == 6


def test_images_come_in_every_shape_and_order(pictures, tmp_path):
    classifier(tmp_path)
    ours = pipeline("image-classification", model=tmp_path, batch_size=2)
    wanted = ours(pictures)
    alike(list(ours(image for image in pictures)), wanted)
    alike([ours(image) for image in pictures], wanted)
    alike(pipeline("image-classification", model=tmp_path)(tuple(pictures)), wanted)
    file = io.BytesIO()
    pictures[1].convert("RGB").save(file, "PNG")
    for source in (file.getvalue(), {"bytes": file.getvalue()}, io.BytesIO(file.getvalue()),
                   np.array(pictures[1].convert("RGB"))):  # fmt: skip
        alike([ours(source)], wanted[1:2])
    batch = np.stack([np.array(pictures[2].convert("RGB"))] * 3)
    alike(ours(batch), wanted[2:3] * 3)
    assert ours([]) == []


def test_images_of_several_sizes_are_computed_in_groups(pictures, tmp_path):
    processor = transformers.ViTImageProcessorPil(size={"shortest_edge": 16})
    saved(tmp_path, "dinov2", "AutoModelForImageClassification", processor, **VISION)
    ours = pipeline("image-classification", model=tmp_path)
    alike(ours(pictures), [ours(image) for image in pictures])


def test_a_model_of_gray_images_gets_gray_ones(tmp_path):
    processor = transformers.ViTImageProcessorPil(size=16, image_mean=[0.4], image_std=[0.3])
    saved(tmp_path, "vit", "AutoModelForImageClassification", processor, **VISION, num_channels=1)
    ours = pipeline("image-classification", model=tmp_path)
    gray = picture((12, 12), "L")
    alike([ours(gray)], [ours(gray.convert("RGB"))])
    alike([ours(gray)], [ours(np.array(gray))])


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_zero_shot_image_classification_equals_the_peer(family, pictures, tokens, tmp_path):
    text = {**LAYERS, "vocab_size": 60, "max_position_embeddings": 64, "eos_token_id": 2,
            "bos_token_id": 1, "pad_token_id": 2}  # fmt: skip
    kinds = {
        "clip": transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
        "siglip": transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    }
    model = saved(
        tmp_path, family, "AutoModel", kinds[family], vision_config=VISION, text_config=text
    )
    with torch.no_grad():
        if family == "clip":
            model.text_projection.weight.mul_(0.2)
    model.save_pretrained(tmp_path)
    Tokenizer.from_pretrained(tokens).save_pretrained(tmp_path)
    # The peer leaves the mask out for SigLIP, too: its tokenizer makes none.
    inputs = ["input_ids"] + (["attention_mask"] if family == "clip" else [])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokens / "tokenizer.json"), pad_token="<end>", eos_token="<end>",
        model_input_names=inputs,
    )  # fmt: skip
    theirs = transformers.pipeline(
        "zero-shot-image-classification", model=model, image_processor=kinds[family], tokenizer=fast
    )
    ours = pipeline("zero-shot-image-classification", model=tmp_path)
    for options in ({}, {"hypothesis_template": "{}"}):
        wanted = theirs(pictures, candidate_labels=LABELS, **options)
        alike(ours(pictures, candidate_labels=LABELS, **options), wanted)
    alike([ours(pictures[0], LABELS)], [theirs(pictures[0], candidate_labels=LABELS)])
    alike([ours(pictures[0], ", ".join(LABELS))], [ours(pictures[0], LABELS)])
    with pytest.raises(ConfigError, match="needs candidate_labels"):
        ours(pictures[0])
    with pytest.raises(ConfigError, match="candidate_labels is empty"):
        ours(pictures[0], [])
    with pytest.raises(ConfigError, match=r"has no \{\} for the label"):
        ours(pictures[0], LABELS, hypothesis_template="A photo.")
    features = pipeline("image-feature-extraction", model=tmp_path)
    shared = features(pictures, pool=True, return_tensors=True)
    pixels = kinds[family]([Image.open(pictures[0]).rotate(-90, expand=True)], return_tensors="pt")
    wanted = model.get_image_features(**pixels).pooler_output
    torch.testing.assert_close(shared[0], wanted, rtol=1e-4, atol=1e-5)


def test_image_features_equal_the_peer(pictures, tmp_path):
    processor = transformers.ViTImageProcessorPil(size=16)
    model = saved(tmp_path, "vit", "AutoModel", processor, **VISION)
    theirs = transformers.pipeline(
        "image-feature-extraction", model=model, image_processor=processor
    )
    ours = pipeline("image-feature-extraction", model=tmp_path)
    for options in ({}, {"pool": True}):
        wanted = theirs(pictures, return_tensors=True, **options)
        found = ours(pictures, return_tensors=True, **options)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    one = ours(pictures[0])
    assert np.shape(one) == np.shape(theirs(pictures[0])) == (1, 17, 32)
    vectors = ours.embed(pictures)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    pooled = torch.cat(ours(pictures, pool=True, return_tensors=True))
    torch.testing.assert_close(vectors, pooled / pooled.norm(dim=1, keepdim=True))
    assert ours.embed([]).numel() == 0
    other = ours(pictures[1], image_processor_kwargs={"image_mean": [0.1] * 3})
    assert not np.allclose(other, ours(pictures[1]))


def test_adapters_are_switched(pictures, tmp_path):
    classifier(tmp_path / "base")
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))
        base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(
            base, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
        )
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
        adapted.save_pretrained(tmp_path / name)
    plain = pipeline("image-classification", model=tmp_path / "base")
    both = pipeline(
        "image-classification", model=tmp_path / "base",
        adapter={"one": tmp_path / "one", "two": tmp_path / "two"},
    )  # fmt: skip
    single = pipeline("image-classification", model=tmp_path / "base", adapter=tmp_path / "two")
    assert both.adapters == ["one", "two"]
    alike(both(pictures, adapter="two"), single(pictures))
    assert both(pictures, adapter="one") != single(pictures) != plain(pictures)


def test_a_model_and_its_reader_may_be_given(pictures, tmp_path):
    classifier(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    processor = ImageProcessor("ViTImageProcessor", size=16)
    wanted = pipeline("image-classification", model=tmp_path)(pictures)
    alike(pipeline("image-classification", model, image_processor=processor)(pictures), wanted)
    alike(pipeline("image-classification", model, image_processor=tmp_path)(pictures), wanted)
    with pytest.raises(ConfigError, match="needs its image_processor: pass image_processor="):
        pipeline("image-classification", model)
    with pytest.raises(ConfigError, match="AutoModelForImageClassification"):
        pipeline("image-classification", AutoModel.from_config(model.config),
                 image_processor=processor)  # fmt: skip


def test_what_cannot_be_done_is_said(pictures, tmp_path, monkeypatch):
    classifier(tmp_path)
    ours = pipeline("image-classification", model=tmp_path)
    with pytest.raises(DataError, match=r"input 1.*none\.png"):
        ours([pictures[0], "none.png"])
    with pytest.raises(DataError, match="input 0 is no image"):
        ours(b"nothing")
    with pytest.raises(DataError, match="takes images, got int"):
        ours(3)
    with pytest.raises(ConfigError, match="nearest: 'top_k'"):
        ours(pictures, topk=3)
    with pytest.raises(ConfigError, match="nearest: 'softmax'"):
        ours(pictures, function_to_apply="softmx")
    with pytest.raises(ConfigError, match="no model for zero-shot-image-classification"):
        pipeline("zero-shot-image-classification", model=tmp_path, tokenizer=object())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        CheckpointError, match="google/vit-base-patch16-224: not in the local cache"
    ):
        pipeline("image-classification", local_files_only=True, cache_dir=tmp_path / "empty")
