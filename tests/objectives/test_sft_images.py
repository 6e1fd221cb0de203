"""Fine-tuning on rows with images: packed, marked, read batch by batch, or refused."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

import sighted
import tiny
from sighted import FAMILIES, chat, pair, picture, rows
from topwork import (
    DPOConfig,
    DPOTrainer,
    LoraConfig,
    SelfDistillationTrainer,
    SFTConfig,
    SFTTrainer,
)
from topwork.data.packing import collate
from topwork.errors import ConfigError, DataError, TrainingError
from topwork.media.processor import AutoProcessor
from topwork.objectives.labelled import Labelled


def config(home, **more):
    usual = {
        "output_dir": str(home), "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-2, "max_length": None,
    }  # fmt: skip
    return SFTConfig(**{**usual, **more})


def trainer(home, family="llava", data=None, made=None, **more):
    made = made or pair(family)
    held = more.pop("eval_dataset", None)
    lora = more.pop("peft_config", None)
    given = rows(family) if data is None else data
    return SFTTrainer(made.model, config(home, **more), given, held, made.processor, lora)


def loss_of(run, samples):
    batch = collate(samples, run.objective.placer)
    with torch.no_grad():
        return float(run.objective.loss(run.model, batch).total)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_familiar_padded_loss_and_that_of_rows_alone(family, tmp_path):
    """The familiar call on the processor's output, row by row, labels on the answer alone."""
    made = pair(family)
    run = trainer(tmp_path, family, made=made)
    run.model.eval()
    samples, processor = run.prepared.samples, made.processor
    assert len(samples) == len(rows(family))
    eos, alone, by_hand = processor.tokenizer.eos_token, [], []
    for sample, row in zip(samples, rows(family)):
        if family == "paligemma":
            images = row.get("images") or [row["image"]]
            call = processor(
                [images], [row["prompt"]], suffix=[row["completion"]], return_tensors="pt"
            )
            answer = row["completion"] + eos
        else:
            messages = [dict(m) for m in row["messages"]]
            for image in row.get("images", ()):
                messages[0] = {**messages[0], "content": [
                    {"type": "image", "image": image}, *messages[0]["content"][1:]]}  # fmt: skip
            call = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt"
            )
            said = messages[1]["content"]
            answer = (said if isinstance(said, str) else said[0]["text"]) + eos
        count = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
        labels = call["input_ids"].clone()
        labels[:, :-count] = -100
        assert sample.ids.tolist() == call["input_ids"][0].tolist()
        assert sample.trained.tolist() == (labels[0] != -100).tolist()
        call.pop("labels", None)
        with torch.no_grad():
            by_hand.append(float(made.model(**call, labels=labels).loss) * count)
        alone.append(loss_of(run, [sample]))
    assert alone == pytest.approx(by_hand, rel=1e-5)
    assert loss_of(run, samples) == pytest.approx(sum(by_hand), rel=1e-5)
    assert loss_of(run, samples[1:]) + alone[0] == pytest.approx(sum(by_hand), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_are_never_trained(family, tmp_path):
    answered = [
        {"role": "user", "content": "draw a dog"},
        {"role": "assistant", "content": [{"type": "text", "text": "here: "},
                                          {"type": "image", "image": picture(16, 16)},
                                          {"type": "text", "text": " a dog"}]},
    ]  # fmt: skip
    data = rows(family) if family == "paligemma" else [*rows(family), {"messages": answered}]
    more = {} if family == "paligemma" else {"assistant_only_loss": False}
    run = trainer(tmp_path, family, data, **more)
    for sample in run.prepared.samples:
        image = sample.ids == pair(family).image
        assert not (sample.trained & image).any()
        for placed in sample.images:
            inside = np.zeros(len(image), bool)
            inside[placed.start : placed.stop] = True
            assert image[inside].any()
            image &= ~inside
        assert not image.any()
        assert sample.supervised


def test_packing_fills_packs_with_whole_rows_and_their_images(tmp_path):
    run = trainer(tmp_path, "qwen2_vl", packing=True, max_length=150, max_steps=2)
    assert [len(p) for p in run.train_data] != [1] * 4
    whole = sum(loss_of(run, list(pack)) for pack in run.train_data)
    assert whole == pytest.approx(sum(loss_of(run, [s]) for s in run.prepared.samples), rel=1e-5)
    run.train()
    with pytest.raises(ConfigError, match=r"wrapped.* cuts rows, and images"):
        trainer(tmp_path, packing=True, max_length=64, packing_strategy="wrapped")


def test_steps_do_not_depend_on_how_they_are_cut_into_micro_batches(tmp_path):
    states = []
    for micro, accumulation in ((4, 1), (1, 4)):
        run = trainer(
            tmp_path / str(micro), "idefics3", per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation, max_steps=2, optim="sgd", shuffle=False,
        )  # fmt: skip
        run.train()
        states.append({k: v.clone() for k, v in run.model.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path):
    ends = []
    for home, stop in (("whole", None), ("cut", 2)):
        options = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps",
                   "save_steps": 2, "peft_config": LoraConfig(r=2)}  # fmt: skip
        torch.manual_seed(5)
        run = trainer(tmp_path / home, "smolvlm", **options)
        run.train()
        if stop:
            torch.manual_seed(5)
            run = trainer(tmp_path / home, "smolvlm", **options)
            run.train(resume_from_checkpoint=tmp_path / home / "checkpoint-2")
        ends.append({n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert AutoProcessor.from_pretrained(tmp_path / "cut" / "checkpoint-4").style.placeholder
    other = [*rows(), chat("what?", "a cat", picture(16, 16, 9))]
    torch.manual_seed(5)
    with pytest.raises(Exception, match="other data"):
        trainer(tmp_path / "cut", "smolvlm", other, max_steps=6,
                peft_config=LoraConfig(r=2)).train(True)  # fmt: skip


def test_other_pixels_are_other_data(tmp_path):
    def digest(seed):
        return trainer(tmp_path, data=[chat("what?", "a dog", picture(9, 9, seed))]).prepared

    assert digest(1).fingerprint == digest(1).fingerprint != digest(2).fingerprint


def forms(home):
    """One image as everything that holds one."""
    image = picture(20, 12)
    image.save(home / "one.png")
    stored = (home / "one.png").read_bytes()
    return {
        "pillow": image, "path": str(home / "one.png"), "pathlib": home / "one.png",
        "bytes": stored, "datasets": {"bytes": stored, "path": None}, "array": np.array(image),
    }  # fmt: skip


def test_images_come_as_paths_bytes_arrays_or_pillows_inline_or_in_columns(tmp_path):
    made = pair("qwen2_vl")
    text = {"prompt": "<|image_pad|>what?", "completion": "it"}
    asked = [{"role": "user", "content": "what?"}]
    said = [{"role": "assistant", "content": "it"}]
    losses, plain = [], []
    for image in forms(tmp_path).values():
        data = [
            chat("what?", "it", image),
            chat("what?", "it", image, column=True),
            {"messages": [*asked, *said], "image": image},
            {"prompt": asked, "completion": said, "images": [image]},
        ]
        for row in data:
            run = trainer(tmp_path, made=made, data=[row])
            losses.append(loss_of(run, run.prepared.samples))
        run = trainer(tmp_path, made=made, data=[{**text, "images": [image]}])
        plain.append(loss_of(run, run.prepared.samples))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert plain == pytest.approx([plain[0]] * len(plain), rel=1e-6)


def test_a_dataset_keeps_its_images_as_they_lie_in_its_files(tmp_path):
    image = forms(tmp_path)["path"]
    with Image.open(image) as lazy:
        run = trainer(tmp_path, data=[chat("what?", "it", lazy)])
        wanted = loss_of(run, run.prepared.samples)
    asked = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it"}]
    table = Dataset.from_dict({"messages": [asked], "images": [[image]], "image": [None]})
    table = table.remove_columns("image").cast_column("images", [ImageFeature()])
    run = trainer(tmp_path, data=table)
    (sample,) = run.prepared.samples
    assert set(sample.images[0].source) == {"bytes", "path"}
    assert loss_of(run, [sample]) == pytest.approx(wanted, rel=1e-6)


def test_a_photo_that_is_turned_is_measured_as_it_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(32, 12).save(tmp_path / "turned.jpg", exif=exif)
    run = trainer(tmp_path, "qwen2_vl", [chat("what?", "it", str(tmp_path / "turned.jpg"))])
    assert run.prepared.samples[0].images[0].size == (12, 32)
    assert math.isfinite(loss_of(run, run.prepared.samples))


def test_a_row_whose_images_would_be_cut_is_dropped_and_counted(tmp_path):
    one = picture(16, 16)
    data = [
        chat("what?", "a dog", one),
        chat("which?", "a dog", one, one, one, one),
        chat("what?", "a dog " * 20, one),
        chat("which? " * 20, "a dog", one),
    ]
    fits = len(trainer(tmp_path, data=data).prepared.samples[0])
    run = trainer(tmp_path, data=data, max_length=fits)
    assert [(s.row, len(s.images)) for s in run.prepared.samples] == [(0, 1), (2, 1)]
    assert run.prepared.cut == 1
    assert dict(run.prepared.dropped) == {
        f"whose images do not fit in max_length={fits}": 1,
        f"whose trained part lies beyond max_length={fits}": 1,
    }
    assert any("1 rows dropped, whose images do not fit" in line for line in run.notes)
    assert math.isfinite(loss_of(run, run.prepared.samples))


def test_the_report_counts_images_and_shows_them_as_marks(tmp_path):
    run = trainer(tmp_path)
    text = "\n".join(run.notes)
    assert "images: 4 in 3 rows, written as 64 tokens that are not trained" in text
    assert "[image 24x16, 16 tokens]what?" in text
    assert "<image>" not in text
    assert "⟦a dog</s>⟧" in text


def test_damaged_images_are_refused_before_the_run_with_their_row(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "none.png").write_bytes(b"no image at all")
    for name, why in (("empty", "empty|no image"), ("none", "no image"), ("lost", "cannot read")):
        data = [*rows(), chat("what?", "it", str(tmp_path / f"{name}.png"))]
        with pytest.raises(DataError, match=rf"1 of 5 rows .*row 4: image 0.*({why})"):
            trainer(tmp_path, data=data)


def test_an_image_damaged_behind_its_header_stops_the_run_and_names_its_row(tmp_path):
    file = io.BytesIO()
    picture(60, 60).save(file, "PNG")
    data = [*rows(), chat("what?", "it", file.getvalue()[:4000])]
    run = trainer(tmp_path, data=data, max_steps=5, per_device_train_batch_size=1, shuffle=False)
    with pytest.raises(TrainingError, match=r"row 4, image 0: damaged image"):
        run.train()


def test_an_image_that_changed_since_the_start_is_named(tmp_path):
    picture(20, 12).save(tmp_path / "one.png")
    run = trainer(tmp_path, "qwen2_vl", [chat("what?", "it", str(tmp_path / "one.png"))])
    picture(40, 12).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="row 0, image 0: was 20 x 12 pixels before the run"):
        loss_of(run, run.prepared.samples)


def test_pixels_are_read_when_a_batch_needs_them(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=2, per_device_train_batch_size=2)
    read = []
    inner = type(run.objective.placer).tensors

    def counted(self, samples):
        read.append([s.row for s in samples])
        return inner(self, samples)

    monkeypatch.setattr(type(run.objective.placer), "tensors", counted)
    assert not read
    run.train()
    assert sorted(row for rows in read[-2:] for row in rows) == [0, 1, 2, 3]
    assert all(len(rows) <= 2 for rows in read)


BAD = {
    "few": ([{"type": "image"}, {"type": "text", "text": "what?"}], [], "more images than the row"),
    "many": ([{"type": "image"}], [1, 2], "has 2 images, of which 1 have no"),
    "literal": ([{"type": "text", "text": "<image>"}], [], "1 placeholders .*<image>.* 0 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_images_and_places_that_disagree_are_refused_with_their_row(name, tmp_path):
    content, images, why = BAD[name]
    row = {"messages": [{"role": "user", "content": content},
                        {"role": "assistant", "content": "it"}],
           "images": [picture(9, 9, i) for i in images]}  # fmt: skip
    with pytest.raises(DataError, match=f"row 4: .*{why}"):
        trainer(tmp_path, data=[*rows(), row])


def test_texts_alone_and_images_do_not_mix_silently(tmp_path):
    row = chat("what?", "it", picture(9, 9))
    with pytest.raises(DataError, match="row 0: it has 1 images, which nothing reads here"):
        SFTTrainer(tiny.model(), config(tmp_path), [row], processing_class=tiny.tokenizer())
    made = pair("llava")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM|CausalDecoder.* reads no images"):
        SFTTrainer(tiny.model(), config(tmp_path), [row], processing_class=made.processor)
    with pytest.raises(DataError, match="AutoProcessor as processing_class"):
        SFTTrainer(made.model, config(tmp_path), [row], processing_class=made.processor.tokenizer)
    made.processor.style = sighted.STYLES["CLIPProcessor"]
    with pytest.raises(ConfigError, match="CLIPProcessor puts images beside texts"):
        trainer(tmp_path, made=made)
    with pytest.raises(ConfigError, match=r"writes images as token 9, but .* at token 3"):
        SFTTrainer(made.model, config(tmp_path), [row], processing_class=pair("qwen2_vl").processor)
    with pytest.raises(ConfigError, match=r"takes texts alone: pass its \.tokenizer"):
        SelfDistillationTrainer(
            tiny.model(), train_dataset=[row], processing_class=pair("llava").processor
        )
    with pytest.raises(ConfigError, match="reads no images in its texts"):
        DPOTrainer(tiny.model(), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=[row],
                   processing_class=pair("llava").processor)  # fmt: skip
    with pytest.raises(ConfigError, match="neftune_noise_alpha does not go with images"):
        trainer(tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ConfigError, match="completion_only_loss=False: the prompts of paligemma"):
        trainer(tmp_path, "paligemma", completion_only_loss=False)


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl"])
def test_evaluation_answers_prompts_with_their_images(family, tmp_path):
    run = trainer(
        tmp_path, family, eval_dataset=rows(family), eval_strategy="steps", eval_steps=1,
        max_steps=1, sample_answers=2, gradient_checkpointing=True,
        peft_config=LoraConfig(r=2) if family == "qwen2_vl" else None,
    )  # fmt: skip
    run.train()
    assert any("eval_loss" in entry for entry in run.state.log_history)
    lines = [json.loads(x) for x in (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]]
    assert [line["prompt"].count("[image") for line in lines] == [1, 2]
    made, row = run, rows(family)[0]
    if family == "paligemma":
        call = made.tokenizer([row["images"]], [row["prompt"]], return_tensors="pt")
        del call["labels"]
    else:
        call = made.tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
    out = run.model.generate(**call, max_new_tokens=64, do_sample=False, eos_token_id=2)
    said = run.tokenizer.decode(out[0, call["input_ids"].shape[1] :].tolist())
    assert lines[0]["completions"] == [said]


def test_a_model_given_by_name_brings_its_processor(tmp_path):
    made = pair("smolvlm")
    made.model.save_pretrained(tmp_path / "model")
    made.processor.save_pretrained(tmp_path / "model")
    run = SFTTrainer(
        str(tmp_path / "model"), config(tmp_path / "run", max_steps=1), rows(),
        peft_config=LoraConfig(r=2),
    )  # fmt: skip
    run.train()
    run.save_model()
    assert (tmp_path / "run" / "preprocessor_config.json").is_file()
    assert (tmp_path / "run" / "adapter_config.json").is_file()


def test_a_stream_of_rows_with_images_is_trained(tmp_path):
    run = trainer(tmp_path, data=iter(rows() * 2), max_steps=2, per_device_train_batch_size=2)
    run.train()
    assert run.state.global_step == 2


def test_rows_of_torch_ids_have_a_size():
    row = {"input_ids": torch.arange(7)}
    assert Labelled(collate=None, mean=None).size((0, row)) == 7


def test_a_tiny_smolvlm_learns_to_name_colours(tmp_path):
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}
    rng = np.random.default_rng(0)

    def drawn(name):
        pixels = np.array(colours[name]) + rng.integers(-20, 20, (16, 16, 3))
        return chat("colour?", name, pixels.clip(0, 255).astype(np.uint8))

    data, held = ([drawn(name) for name in colours for _ in range(n)] for n in (4, 1))
    made = pair("smolvlm")
    with torch.no_grad():
        for name, value in made.model.named_parameters():
            usual = torch.zeros_like if name.endswith("bias") else torch.ones_like
            value.copy_(torch.randn_like(value) * 0.06 if value.dim() > 1 else usual(value))
    run = trainer(
        tmp_path, made=made, data=data, eval_dataset=held, eval_strategy="steps", eval_steps=50,
        max_steps=50, per_device_train_batch_size=12, logging_steps=50,
    )  # fmt: skip
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.state.log_history[-2]["eval_loss"]
    assert after < 0.1 * before
    for row, name in zip(held, colours):
        call = made.processor.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        out = made.model.generate(**call, max_new_tokens=8, do_sample=False, eos_token_id=2)
        said = made.processor.decode(out[0, call["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said == name
