"""Captions, answers about images and chats with images, against transformers on tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from topwork import (
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    LoraConfig,
    get_peft_model,
    pipeline,
)
from topwork.errors import ConfigError, DataError

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
LAYERS = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
          "num_attention_heads": 3}  # fmt: skip
VISION = {**LAYERS, "image_size": 16, "patch_size": 4}
TEXT = {**LAYERS, "vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(20, 31), picture(40, 18, 1), picture(9, 9, 2)]


def tokens():
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(["what is in the picture?", "how many are there?"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def saved(home, model, processor):
    """A tiny model of random weights in `home`, with its processor."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2))
    model.eval().save_pretrained(home)
    processor.save_pretrained(home)
    return home, model, processor


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    config = transformers.AutoConfig.for_model(
        "llava", vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **TEXT}, image_token_index=3,
    )  # fmt: skip
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = transformers.LlavaProcessor(
        images, tokens(), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    return saved(tmp_path_factory.mktemp("llava"), model, processor)


def blip(home, maker):
    config = transformers.BlipConfig(text_config=TEXT, vision_config=VISION)
    images = transformers.BlipImageProcessorPil(size={"height": 16, "width": 16})
    processor = transformers.BlipProcessor(images, tokens())
    return saved(home, maker(config), processor)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return blip(tmp_path_factory.mktemp("captions"), transformers.BlipForConditionalGeneration)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return blip(tmp_path_factory.mktemp("answers"), transformers.BlipForQuestionAnswering)


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    names = {i: f"answer {i}" for i in range(7)}
    config = transformers.ViltConfig(**{**VISION, **TEXT, "id2label": names})
    images = transformers.ViltImageProcessorPil(size={"shortest_edge": 64})
    processor = transformers.ViltProcessor(images, tokens())
    model = transformers.ViltForQuestionAnswering(config)
    return saved(tmp_path_factory.mktemp("vilt"), model, processor)


def user(text, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def theirs_of(row):
    _, model, processor = row
    return transformers.pipeline("image-text-to-text", model=model, processor=processor)


def test_chats_are_gone_on_with_as_the_peer_does(chats):
    pipe, peer = pipeline("image-text-to-text", str(chats[0])), theirs_of(chats)
    chat = user("what is it?", PICTURES[0])
    assert pipe(chat, **GREEDY) == peer(text=chat, generate_kwargs=GREEDY)
    both = [chat, user("how many?", PICTURES[1])]
    assert pipe(both, **GREEDY) == peer(text=both, generate_kwargs=GREEDY)
    found = pipe(text=chat, return_full_text=False, **GREEDY)
    assert found == peer(text=chat, return_full_text=False, generate_kwargs=GREEDY)
    begun = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "a picture"}]}]
    assert pipe(begun, **GREEDY) == peer(text=begun, generate_kwargs=GREEDY)


def test_images_with_texts_are_gone_on_with_as_the_peer_does(chats):
    pipe, peer = pipeline("image-text-to-text", str(chats[0])), theirs_of(chats)
    text = "<image>what is it?"
    assert pipe(PICTURES[0], text=text, **GREEDY) == peer(
        PICTURES[0], text=text, generate_kwargs=GREEDY
    )
    rows = [{"images": PICTURES[i], "text": text} for i in range(2)]
    assert pipe(rows, **GREEDY) == [peer(r["images"], text=text, generate_kwargs=GREEDY)
                                    for r in rows]  # fmt: skip
    assert pipe(PICTURES[:2], text=[text] * 2, **GREEDY) == pipe(rows, **GREEDY)
    stream = pipe(iter(rows), **GREEDY)
    assert list(stream) == pipe(rows, **GREEDY)
    assert len(pipe(PICTURES[0], text=text, num_return_sequences=2, num_beams=2, **GREEDY)) == 2


def test_captions_are_the_models_decoded(captions, tmp_path):
    home, model, processor = captions
    pipe = pipeline("image-to-text", str(home))
    pixels = processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    out = model.generate(pixel_values=pixels, **GREEDY)
    texts = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    wanted = [[{"generated_text": text.strip()}] for text in texts]
    assert pipe(PICTURES, **GREEDY) == wanted
    PICTURES[0].save(tmp_path / "one.png")
    assert pipe(str(tmp_path / "one.png"), **GREEDY) == wanted[0]
    assert pipeline("image-to-text", str(home), batch_size=1)(PICTURES, **GREEDY) == wanted
    ids = processor.tokenizer("the picture", return_tensors="pt")["input_ids"]
    out = model.generate(pixel_values=pixels[:1], input_ids=ids, **GREEDY)
    text = processor.tokenizer.decode(out[0], skip_special_tokens=True).strip()
    found = pipe(PICTURES[0], prompt="the picture", **GREEDY)
    assert found == [{"generated_text": text}]


def test_captions_of_a_model_of_chats_follow_their_prompt(chats):
    home, model, processor = chats
    pipe = pipeline("image-to-text", str(home))
    call = processor(images=PICTURES[1], text="<image>what is it?", return_tensors="pt")
    out = model.generate(**call, **GREEDY)
    text = processor.tokenizer.decode(out[0], skip_special_tokens=True).strip()
    assert pipe(PICTURES[1], prompt="what is it?", **GREEDY) == [{"generated_text": text}]
    assert pipe(PICTURES[1], prompt="<image>what is it?", **GREEDY) == [{"generated_text": text}]


def test_answers_among_labels_are_sigmoids_of_the_logits(labels):
    home, model, processor = labels
    pipe = pipeline("visual-question-answering", str(home))
    questions = ["what is it?", "how many are there?", "what"]
    rows = [{"image": a, "question": b} for a, b in zip(PICTURES, questions)]
    wanted = []
    for row in rows:
        call = processor(images=row["image"], text=row["question"], return_tensors="pt")
        with torch.no_grad():
            scores = model(**call).logits.sigmoid()[0]
        best = scores.topk(5)
        wanted.append([(f"answer {i}", s) for s, i in zip(*(t.tolist() for t in best))])
    found = pipe(rows)
    for ours, theirs in zip(found, wanted):
        assert [a["answer"] for a in ours] == [name for name, _ in theirs]
        scores = [a["score"] for a in ours]
        assert np.allclose(scores, [score for _, score in theirs], rtol=1e-4)
    alone = pipe(PICTURES[0], questions[0], top_k=2)
    assert [a["answer"] for a in alone] == [name for name, _ in wanted[0][:2]]
    both = pipe(PICTURES[0], questions[:2])
    assert [len(row) for row in both] == [5, 5]
    assert pipe(PICTURES, questions, top_k=1)[2][0]["answer"] == wanted[2][0][0]


def test_written_answers_are_the_models_decoded(answers):
    home, model, processor = answers
    pipe = pipeline("vqa", str(home))
    call = processor(images=PICTURES[0], text="what is it?", return_tensors="pt")
    out = model.generate(**call, **GREEDY)
    text = processor.tokenizer.decode(out[0], skip_special_tokens=True).strip()
    assert pipe(PICTURES[0], "what is it?", **GREEDY) == [{"answer": text}]
    several = pipe(PICTURES, ["what is it?", "how many are there?", "what"], **GREEDY)
    assert several[0] == [{"answer": text}]


def test_an_adapter_is_loaded_and_switched(labels, tmp_path):
    base = AutoModelForVisualQuestionAnswering.from_pretrained(labels[0])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value))
    model.save_pretrained(tmp_path)
    plain = pipeline("visual-question-answering", str(labels[0]))(PICTURES[0], "what?")
    adapted = pipeline("visual-question-answering", str(labels[0]), adapter=str(tmp_path))
    assert adapted(PICTURES[0], "what?") != plain
    own = pipeline("visual-question-answering", model,
                   processor=AutoProcessor.from_pretrained(labels[0]))  # fmt: skip
    assert own(PICTURES[0], "what?") == adapted(PICTURES[0], "what?")


def test_bad_inputs_are_named(labels, chats, captions):
    vqa = pipeline("visual-question-answering", str(labels[0]))
    with pytest.raises(DataError, match='input 0 needs an "image" and a "question"'):
        vqa({"image": PICTURES[0]})
    with pytest.raises(DataError, match="input 0: the question is empty"):
        vqa(PICTURES[0], " ")
    with pytest.raises(DataError, match="3 images, but 2 questions"):
        vqa(PICTURES, ["a", "b"])
    with pytest.raises(ConfigError, match="top_k=0"):
        vqa(PICTURES[0], "what?", top_k=0)
    pipe = pipeline("image-text-to-text", str(chats[0]))
    with pytest.raises(DataError, match="an image without a text"):
        pipe(PICTURES[0])
    with pytest.raises(DataError, match="images beside a chat"):
        pipe(PICTURES[0], text=user("a", PICTURES[0]))
    with pytest.raises(DataError, match="1 placeholders '<image>', but 2 images"):
        pipe({"images": PICTURES[:2], "text": "<image>what?"})
    with pytest.raises(DataError, match="input 1"):
        pipeline("image-to-text", str(captions[0]))([PICTURES[0], "no such file.png"])
