"""Preferences over answers to images: shared prompts, cuts of a step, and rows that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
import topwork
from sighted import FAMILIES, pair, picture
from topwork import LoraConfig
from topwork.data.groups import Group
from topwork.data.prepare import Sample
from topwork.errors import ConfigError, DataError, TrainingError
from topwork.objectives.answers import collect
from topwork.objectives.logprobs import token_logprobs

PICTURES = [picture(24, 16), picture(16, 30, 1), picture(20, 20, 2)]
PAIRS = [
    {"prompt": [{"role": "user", "content": asked}], "images": images,
     "chosen": [{"role": "assistant", "content": chosen}],
     "rejected": [{"role": "assistant", "content": rejected}]}
    for asked, images, chosen, rejected in [
        ("what?", PICTURES[:1], "a dog", "no"),
        ("which of them?", PICTURES[1:], "both", "neither of the two"),
        ("hello", [], "good day", "what"),
        ("how many?", PICTURES[2:], "3", "a good many more"),
    ]
]  # fmt: skip
TEXTS = [
    {"prompt": "<image>what", "chosen": "a dog", "rejected": "no", "images": PICTURES[:1]},
    {"prompt": "<image><image>which", "chosen": "both", "rejected": "none", "images": PICTURES[1:]},
]


def data_of(family):
    return TEXTS if family == "paligemma" else PAIRS


def trainer(home, name="DPO", family="llava", rows=None, made=None, **options):
    made = made or pair(family)
    lora = options.pop("peft_config", None)
    values = {"output_dir": str(home), "disable_tqdm": True, "save_strategy": "no", "max_steps": 1,
              "logging_steps": 1, "shuffle": False, "max_grad_norm": 0, "max_length": None,
              "per_device_train_batch_size": 4}  # fmt: skip
    return getattr(topwork, f"{name}Trainer")(
        made.model, args=getattr(topwork, f"{name}Config")(**{**values, **options}),
        train_dataset=data_of(family) if rows is None else rows,
        processing_class=made.processor, peft_config=lora,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_with_images_gives_what_answers_apart_give(family, tmp_path):
    """Loss and gradients; in PaliGemma prompts look ahead, in Qwen they have places."""
    run = trainer(tmp_path, family=family)
    placer, samples = run.objective.placer, run.prepared.samples
    assert all(len(s.answers) == 2 and len(s.prompt) for s in samples)
    apart = [
        Group(s.row, np.zeros(0, np.int32), (
            Sample(s.row, np.concatenate([s.prompt, a.ids]),
                   np.concatenate([np.zeros(len(s.prompt), bool), a.trained]),
                   images=s.prompt_images),))
        for s in samples for a in s.answers
    ]  # fmt: skip
    from topwork.data.groups import collate_groups

    found = []
    for batch in (collect(run.model, samples, placer).batch, collate_groups(apart, placer)):
        run.model.zero_grad()
        logprobs = token_logprobs(run.model, batch)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        grads = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
        found.append((logprobs.detach(), {n: g.clone() for n, g in grads.items()}))
    (one, mine), (two, theirs) = found
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert mine.keys() == theirs.keys()
    floor = 5e-2 * max(g.norm() for g in theirs.values())
    for name, grad in theirs.items():
        assert (mine[name] - grad).norm() < 1e-4 * max(grad.norm(), floor), name


@pytest.mark.parametrize(
    ("name", "options"),
    [("DPO", {}), ("DPO", {"precompute_ref_log_probs": True}), ("KTO", {}), ("CPO", {}),
     ("ORPO", {"prompt_nll": False})],
    ids=str,
)  # fmt: skip
def test_steps_do_not_depend_on_how_they_are_cut(name, options, tmp_path):
    logs = []
    for micro, accumulation in ((4, 1), (2, 2)):
        torch.manual_seed(3)
        run = trainer(
            tmp_path / str(micro), name, "qwen2_vl", per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation, peft_config=LoraConfig(r=2), **options,
        )  # fmt: skip
        assert any("images: " in note for note in run.notes)
        run.train()
        logs.append(run.state.log_history[0])
    assert logs[0]["grad_norm"] > 0
    for key in ("loss", "grad_norm"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-4), key


def test_images_of_the_answers_stay_in_their_answers(tmp_path):
    shown = [
        {"role": "assistant", "content": [{"type": "text", "text": "see "},
                                          {"type": "image", "image": image},
                                          {"type": "text", "text": " here"}]}
        for image in PICTURES[:2]
    ]  # fmt: skip
    rows = [{**PAIRS[0], "images": None, "chosen": shown[:1], "rejected": shown[1:]}]
    (sample,) = trainer(tmp_path, rows=rows).prepared.samples
    assert not sample.prompt_images
    assert [[p.source for p in a.images] for a in sample.answers] == [[p] for p in PICTURES[:2]]
    whole = np.concatenate([sample.prompt, *(a.ids for a in sample.answers)])
    token = pair("llava").image
    assert all((whole[i.start : i.stop] == token).all() for i in sample.images)
    assert (whole == token).sum() == sum(i.stop - i.start for i in sample.images)


def test_images_beyond_max_length_drop_their_row_and_are_counted(tmp_path):
    run = trainer(tmp_path, max_length=38)
    assert run.prepared.dropped["whose images do not fit in max_length=38"] == 1


def test_an_image_that_cannot_be_read_stops_the_run_with_its_row(tmp_path):
    path = tmp_path / "a.png"
    PICTURES[0].save(path)
    run = trainer(tmp_path / "run", rows=[{**PAIRS[0], "images": [str(path)]}])
    path.write_bytes(b"no image")
    with pytest.raises(TrainingError, match="row 0, image 0"):
        run.train()


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO", "Reward"])
def test_a_model_of_texts_refuses_images_by_name(name, tmp_path):
    model, labels = tiny.model(), {}
    if name == "Reward":
        labels = {**model.config.to_dict(), "num_labels": 1}
        model = topwork.AutoModelForSequenceClassification.from_config(topwork.Config(**labels))
    with pytest.raises(DataError, match=r"row 0: it has 1 images, which nothing reads.*`images`"):
        getattr(topwork, f"{name}Trainer")(
            model, args=getattr(topwork, f"{name}Config")(output_dir=str(tmp_path)),
            train_dataset=PAIRS[:2], processing_class=tiny.tokenizer(),
        )  # fmt: skip


@pytest.mark.parametrize("inside", [False, True])
def test_prompts_to_be_answered_refuse_images(inside, tmp_path):
    row = {"prompt": PAIRS[0]["prompt"], "images": PICTURES[:1]}
    if inside:
        row = {"prompt": [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}]}]}
    with pytest.raises(DataError, match="row 0 has images"):
        topwork.GRPOTrainer(
            tiny.model(), [lambda completions, **_: [0.0] * len(completions)],
            topwork.GRPOConfig(output_dir=str(tmp_path)), [row], processing_class=tiny.tokenizer(),
        )  # fmt: skip


def test_steps_with_images_and_prompts_that_are_trained_are_refused(tmp_path):
    from topwork.data.preferences import STEPS

    row = {"prompt": "1", "completions": ["a"], "labels": [True], "image": PICTURES[0]}
    with pytest.raises(DataError, match="process rewards do not read"):
        STEPS[0].read(row)
    with pytest.raises(ConfigError, match="prompt_nll=True"):
        trainer(tmp_path, "ORPO")
