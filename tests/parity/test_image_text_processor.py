"""Joint processors of images and texts against transformers' (through Pillow), to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from topwork.errors import ConfigError, DataError
from topwork.media import AutoProcessor
from topwork.media.image_text import STYLES
from topwork.media.tiles import smart_size

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|image_pad|>", "<|video_pad|>", "<start_of_image>",
           "<end_of_image>", "<image_soft_token>", "<fake_token_around_image>", "<global-img>",
           "<end_of_utterance>", "<row_1_col_1>", "<row_1_col_2>"]  # fmt: skip
GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
         "image_token": "<image_soft_token>"}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}TOKEN{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# Processor → (its image processor, its options, the tokenizer's extra names, the placeholder).
ROWS = {
    "BlipProcessor": (BlipImageProcessorPil(size={"height": 32, "width": 32}), {}, {}, None),
    "CLIPProcessor": (CLIPImageProcessorPil(), {}, {}, None),
    "SiglipProcessor": (SiglipImageProcessorPil(size={"height": 32, "width": 32}), {}, {}, None),
    "ViltProcessor": (ViltImageProcessorPil(size={"shortest_edge": 96}), {}, {}, None),
    "LlavaProcessor": (
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        {"patch_size": 14, "vision_feature_select_strategy": "default",
         "num_additional_image_tokens": 1}, {}, "<image>",
    ),
    "PaliGemmaProcessor": (
        SiglipImageProcessorPil(size={"height": 32, "width": 32}), {}, {}, "<image>",
    ),
    "Gemma3Processor": (
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), {"image_seq_length": 5}, GEMMA,
        "<start_of_image>",
    ),
    "Qwen2VLProcessor": (
        Qwen2VLImageProcessorPil(patch_size=4, min_pixels=1024, max_pixels=4096), {}, {},
        "<|image_pad|>",
    ),
    "Qwen2_5_VLProcessor": (Qwen2VLImageProcessorPil(), {}, {}, "<|image_pad|>"),
    "Idefics3Processor": (
        Idefics3ImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32}),
        {"image_seq_len": 3}, {}, "<image>",
    ),
    "SmolVLMProcessor": (
        SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32},
                                 do_image_splitting=False),
        {"image_seq_len": 3}, {}, "<image>",
    ),
}  # fmt: skip
PLACED = [name for name, row in ROWS.items() if row[3]]


def test_every_style_has_its_row():
    assert set(ROWS) == set(STYLES)


def core(bos=True):
    made = Core(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(["what is in the picture?", "describe it"], trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
        )
    return made


@pytest.fixture(scope="module", params=ROWS, ids=list(ROWS))
def pair(request, tmp_path_factory):
    """The peer's processor, and ours read from its files."""
    name = request.param
    images, options, extra, token = ROWS[name]
    folder = tmp_path_factory.mktemp(name)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core(bos=name != "PaliGemmaProcessor"), pad_token="<pad>",
        bos_token="<s>", eos_token="</s>", padding_side="left", extra_special_tokens=extra,
    )  # fmt: skip
    if name == "PaliGemmaProcessor":
        images.image_seq_length = 4
    kind = getattr(transformers, name)
    template = TEMPLATE.replace("TOKEN", token or "")
    if name == "SmolVLMProcessor":  # the peer's wants a reader of videos, which needs torchvision
        kind = transformers.Idefics3Processor
    if name in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"):
        theirs = kind.__new__(kind)
        theirs.image_processor, theirs.tokenizer, theirs.chat_template = images, tokenizer, template
        theirs.image_token, theirs.video_token = "<|image_pad|>", "<|video_pad|>"
        theirs.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        theirs.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        images.save_pretrained(folder)
        (folder / "processor_config.json").write_text(f'{{"processor_class": "{name}"}}')
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(template)
    else:
        given = {**options, "chat_template": template} if token else options
        theirs = kind(image_processor=images, tokenizer=tokenizer, **given)
        theirs.save_pretrained(folder)
    ours = AutoProcessor.from_pretrained(folder)
    return name, theirs, ours, token


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(70, 50), picture(40, 90, 1), picture(33, 33, 2)]


def same(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].shape == value.shape, key
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def test_tensors_of_a_batch_equal_the_peers(pair):
    name, theirs, ours, token = pair
    if token is None:
        texts = ["what is it?", "describe it", "the"]
        images = PICTURES
        if name == "SiglipProcessor":
            options = {"padding": "max_length", "max_length": 12, "truncation": True}
        else:
            options = {"padding": True}
    else:
        options = {"padding": True}
        texts = [f"{token}what is it?", f"{token}describe it", f"{token}the"]
        images = [[one] for one in PICTURES]
        if name not in ("PaliGemmaProcessor", "LlavaProcessor"):
            texts[0] = f"{token}what is {token}"
            images[0] = [PICTURES[2], PICTURES[0]]
    wanted = theirs(images=images, text=texts, return_tensors="pt", **options)
    found = ours(images=images, text=texts, return_tensors="pt", **options)
    same(found, wanted)


def test_one_text_and_its_image_equal_the_peers(pair):
    _, theirs, ours, token = pair
    text = f"{token or ''}describe it"
    wanted = theirs(images=PICTURES[0], text=text, return_tensors="pt")
    same(ours(images=PICTURES[0], text=text, return_tensors="pt"), wanted)
    plain = ours(images=PICTURES[0], text=text)["input_ids"]
    assert plain == theirs(images=PICTURES[0], text=text)["input_ids"]


def test_chats_with_images_equal_the_peers(pair):
    name, theirs, ours, token = pair
    if token is None:
        return
    chat = [
        {"role": "user", "content": [{"type": "image", "image": PICTURES[1]},
                                     {"type": "text", "text": "what is it?"}]},
    ]  # fmt: skip
    if name != "PaliGemmaProcessor":
        chat += [{"role": "assistant", "content": [{"type": "text", "text": "the picture"}]}]
    options = {"add_generation_prompt": True}
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    same(ours.apply_chat_template(chat, **options), theirs.apply_chat_template(chat, **options))


def test_what_we_save_reads_the_same(pair, tmp_path):
    _, _, ours, token = pair
    ours.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    text = f"{token or ''}describe it"
    same(
        again(images=PICTURES[0], text=text, return_tensors="pt"),
        ours(images=PICTURES[0], text=text, return_tensors="pt"),
    )
    assert again.style is ours.style


def test_placeholders_and_images_that_disagree_are_named(pair):
    _, _, ours, token = pair
    if token is None:
        return
    with pytest.raises(DataError, match=r"2 placeholders .*, but 1 images"):
        ours(images=PICTURES[0], text=f"{token}a{token}")
    with pytest.raises(DataError, match=r"0 placeholders|has no <image>"):
        ours(images=PICTURES[0], text="no image here")
    with pytest.raises(DataError, match=r"placeholders .*, but 0 images"):
        ours(text=f"{token}a")
    with pytest.raises(DataError, match="text 0 has 2 placeholders"):
        ours(images=[[PICTURES[0]], PICTURES[1:]], text=[f"{token}{token}", token])
    with pytest.raises(DataError, match="was cut within an image"):
        ours(images=PICTURES[0], text=f"{token}a", truncation=True, max_length=2)
    with pytest.raises(ConfigError, match="images or text"):
        ours()


def test_paligemmas_answers_are_its_labels(tmp_path):
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core(bos=False), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 4
    theirs = transformers.PaliGemmaProcessor(images, made)
    theirs.save_pretrained(tmp_path)
    ours = AutoProcessor.from_pretrained(tmp_path)
    call = {"text": ["<image>what", "<image>describe it"], "suffix": ["a picture", "it"]}
    options = {"images": [[p] for p in PICTURES[:2]], "padding": True, "return_tensors": "pt"}
    same(ours(**call, **options), theirs(**call, **options))


@pytest.mark.parametrize("size", [(50, 70), (1, 150), (4000, 3000), (28, 28), (99, 41)])
def test_smart_sizes_are_multiples_within_their_bounds(size):
    high, wide = smart_size(*size, 28, 56 * 56, 28 * 28 * 16)
    assert high % 28 == wide % 28 == 0
    assert high * wide <= 28 * 28 * 16 or min(high, wide) == 28
    assert high * wide >= 56 * 56


def test_a_strip_of_an_image_is_refused_by_name():
    from topwork.media import ImageProcessor

    with pytest.raises(DataError, match="the image: 1000 x 2 pixels are more than 200 times"):
        ImageProcessor("Qwen2VLImageProcessor")(picture(1000, 2))
