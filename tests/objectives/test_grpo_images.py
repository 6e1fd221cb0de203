"""Answers that are drawn to prompts with images: written, judged, trained, told, refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny
from sighted import FAMILIES, pair, picture
from topwork import (
    A2POConfig,
    A2POTrainer,
    AutoModelForSequenceClassification,
    Config,
    GRPOConfig,
    GRPOTrainer,
    LoraConfig,
    NashMDTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SDPOConfig,
    SDPOTrainer,
    XPOConfig,
    XPOTrainer,
)
from topwork.cli.main import app
from topwork.errors import ConfigError, DataError, TrainingError
from topwork.objectives import rollouts
from topwork.objectives.rollouts import read_prompts, roll_out
from topwork.objectives.sdpo import retold


def big(completion_ids, **_):
    return [float(len(ids)) + sum(ids) / 1000 for ids in completion_ids]


def classifier():
    config = Config(**{**tiny.model().config.to_dict(), "num_labels": 1})
    return AutoModelForSequenceClassification.from_config(config)


def asked(family):
    """One image, two of other shapes, and none."""
    pictures = [picture(24, 16), picture(16, 30, 1), picture(20, 20, 2)]
    if family == "paligemma":
        return [{"prompt": "<image>what?", "images": pictures[:1]},
                {"prompt": "<image>which?", "images": pictures[1:2]}]  # fmt: skip
    return [
        {"prompt": [{"role": "user", "content": "what?"}], "images": pictures[:1]},
        {"prompt": [{"role": "user", "content": [
            {"type": "image", "image": pictures[1]}, {"type": "text", "text": "or "},
            {"type": "image", "image": pictures[2]}]}]},
        {"prompt": [{"role": "user", "content": "hello"}]},
    ]  # fmt: skip


def settings(home, kind=GRPOConfig, **more):
    usual = {
        "output_dir": str(home), "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-2, "num_generations": 2, "per_device_train_batch_size": 4,
        "max_completion_length": 5, "max_steps": 2,
    }  # fmt: skip
    return kind(**{**usual, **more})


def trainer(home, family="llava", kind=GRPOTrainer, made=None, data=None, **more):
    made = made or pair(family)
    lora = more.pop("peft_config", None)
    extra = {k: more.pop(k) for k in ("tools",) if k in more}
    config = RLOOConfig if kind is RLOOTrainer else GRPOConfig
    return kind(
        made.model, big, settings(home, config, **more), data or asked(family),
        processing_class=made.processor, peft_config=lora, **extra,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_the_processor_writes(family, tmp_path):
    made = pair(family)
    run = trainer(tmp_path, family, made=made)
    for prompt, row in zip(run.train_data, asked(family)):
        if family == "paligemma":
            call = made.processor([row["images"]], [row["prompt"]], return_tensors="pt")
        else:
            messages = [dict(m) for m in row["prompt"]]
            if row.get("images"):
                messages[0]["content"] = [{"type": "image", "image": row["images"][0]},
                                          {"type": "text", "text": "what?"}]  # fmt: skip
            call = made.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
        assert prompt.ids.tolist() == call["input_ids"][0].tolist()
        inside = np.isin(prompt.ids, made.image)
        for image in prompt.images:
            assert inside[image.start : image.stop].any()
            inside[image.start : image.stop] = False
        assert not inside.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(family, tmp_path, monkeypatch):
    """At a temperature near 0 a draw is the likeliest answer, to one prompt as to several."""
    made = pair(family)
    run = trainer(tmp_path, family, made=made, temperature=1e-4)
    draw, prompts = run.objective.draw, run.train_data
    assert len({len(p) for p in prompts}) == len(prompts)
    found = roll_out(draw.writer, made.model, prompts, 2, 5)
    for prompt, (first, second) in zip(prompts, found):
        out = made.model.generate(
            torch.from_numpy(prompt.ids).long()[None], **draw.placer.tensors([prompt.sample()]),
            max_new_tokens=5, do_sample=False, eos_token_id=2,
        )  # fmt: skip
        assert first.ids == second.ids == out[0, len(prompt) :].tolist()
        assert first.ended == (2 in first.ids)
    monkeypatch.setattr(rollouts, "ENGINE_ROWS", 3)  # one prompt at a time
    again = roll_out(draw.writer, made.model, prompts, 2, 5)
    assert [[a.ids for a in row] for row in again] == [[a.ids for a in row] for row in found]
    other = [{**row, "images": [picture(24, 16, 9)]} for row in asked(family)[:1]]
    (prompt,) = trainer(tmp_path, family, made=made, data=other).train_data
    assert prompt.ids.tolist() == prompts[0].ids.tolist()
    assert prompt.images != prompts[0].images


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
def test_a_run_learns_what_is_rewarded(family, kind, tmp_path):
    torch.manual_seed(0)
    run = trainer(tmp_path, family, kind, beta=0.05, peft_config=LoraConfig(r=2))
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    run.train()
    after = [p for p in run.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    logs = [e for e in run.state.log_history if "loss" in e]
    assert all(np.isfinite(e["loss"]) and e["completions/mean_length"] > 0 for e in logs)
    assert (tmp_path / "completions.jsonl").is_file()


OTHERS = [
    (OnlineDPOTrainer, OnlineDPOConfig, {}), (XPOTrainer, XPOConfig, {"alpha": 0.1}),
    (PPOTrainer, PPOConfig, {"num_ppo_epochs": 2}),
    (SDPOTrainer, SDPOConfig, {"success_reward_threshold": 0.0, "distillation_weight": 0.5}),
    (A2POTrainer, A2POConfig, {"num_value_samples": 2, "beta2": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "more"), OTHERS)
def test_other_trainers_over_drawn_answers_see_too(kind, config, more, tmp_path):
    torch.manual_seed(0)
    made = pair("qwen2_vl")
    run = kind(
        made.model, reward_funcs=big, args=settings(tmp_path, config, **more),
        train_dataset=asked("qwen2_vl"), processing_class=made.processor,
        peft_config=LoraConfig(r=2),
    )  # fmt: skip
    (batch,) = run.objective.assemble(run.model, [run.train_data[:1]])
    assert len(batch.batch.images["pixel_values"])
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    run.train()
    after = [p for p in run.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    assert all(np.isfinite(e["loss"]) for e in run.state.log_history if "loss" in e)


def test_a_whole_group_in_one_pass_is_the_answers_apart(tmp_path):
    """The prompt's images are read once for all answers of the group."""
    made = pair("qwen2_vl")
    run = trainer(tmp_path, "qwen2_vl", made=made)
    torch.manual_seed(1)
    (whole,) = run.objective.assemble(made.model, [run.train_data[:2]])
    assert whole.batch.images["pixel_values"].shape[0] == sum(
        made.processor.image_processor([i.source])["image_grid_thw"].prod()
        for p in run.train_data[:2] for i in p.images
    )  # fmt: skip
    with torch.no_grad():
        logprobs = run.objective._logprobs(made.model, whole)
    at = 0
    for prompt, count in zip(run.train_data[:2], (2, 2)):
        for _ in range(count):
            n = int((whole.batch.owners == at).sum())
            ids = whole.batch.targets[whole.batch.owners == at].tolist()
            call = {"input_ids": torch.tensor([[*prompt.ids.tolist(), *ids]])}
            with torch.no_grad():
                logits = made.model(
                    **call, **run.objective.draw.placer.tensors([prompt.sample()])
                ).logits[0, -n - 1 : -1]
            alone = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(
                logprobs[whole.batch.owners == at], alone, rtol=1e-4, atol=1e-5
            )
            at += 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_teacher_of_sdpo_sees_what_the_policy_sees(family, tmp_path):
    made = pair(family)
    args = settings(tmp_path, SDPOConfig, success_reward_threshold=0.0)
    run = SDPOTrainer(made.model, big, args, asked(family), processing_class=made.processor)
    torch.manual_seed(1)
    (whole,) = run.objective.assemble(made.model, [run.train_data[:2]])
    assert whole.taught.all()
    pixels = [batch.images["pixel_values"] for batch in (whole.teacher, whole.batch)]
    assert len(pixels[0]) == 2 * len(pixels[1])  # two answers, each with a teacher of its own
    draw = run.objective.draw
    with torch.no_grad():
        said = run.objective._logprobs(made.model, replace(whole, batch=whole.teacher))
    answers = [whole.batch.targets[whole.batch.owners == k].tolist() for k in range(4)]
    for k, prompt in enumerate([p for p in run.train_data[:2] for _ in range(2)]):
        shown = draw.tokenizer.decode(answers[k ^ 1], skip_special_tokens=True)
        solution = run.args.solution_template.format(successful_previous_attempt=shown)
        given = retold(prompt, run.args.reprompt_template, solution, "")
        row = {**prompt.columns, "prompt": given}
        ((seen,), _) = read_prompts([row], draw.tokenizer, None, placer=draw.placer)
        assert shown in draw.tokenizer.decode(seen.ids.tolist())
        assert [i.source for i in seen.images] == [i.source for i in prompt.images]
        ids = torch.tensor([[*seen.ids.tolist(), *answers[k]]])
        with torch.no_grad():
            logits = made.model(input_ids=ids, **draw.placer.tensors([seen.sample()])).logits[0]
        wanted = logits[-len(answers[k]) - 1 : -1].log_softmax(-1)
        wanted = wanted.gather(1, torch.tensor(answers[k])[:, None])[:, 0]
        own = said[whole.teacher.owners == k]
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_between_passes_holds_the_images(tmp_path):
    def run(home, **more):
        torch.manual_seed(0)
        return trainer(
            home, "llava", num_iterations=2, max_steps=4, peft_config=LoraConfig(r=2), **more
        )

    whole = run(tmp_path / "a")
    whole.train()
    half = run(tmp_path / "b", save_strategy="steps", save_steps=1)
    half.train()
    late = run(tmp_path / "c")
    late.train(resume_from_checkpoint=tmp_path / "b" / "checkpoint-1")
    for (name, a), (_, b) in zip(whole.model.named_parameters(), late.model.named_parameters()):
        assert torch.equal(a, b), name


def test_notes_and_preview_show_the_images(tmp_path):
    made = pair("llava")
    run = trainer(tmp_path / "run", made=made)
    assert any(line.startswith("images: 3 in 2 rows") for line in run.notes)
    assert "[image 24x16, 16 tokens]" in run.notes[-1]
    home = tmp_path / "home"
    made.processor.save_pretrained(home)
    (home / "config.json").write_text(json.dumps(made.model.config.to_dict()))
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(home / "a.png")
    row = {"prompt": [{"role": "user", "content": "what?"}], "images": [str(home / "a.png")]}
    (home / "rows.jsonl").write_text(json.dumps(row))
    words = ["preview", "--model", home, "--data", home / "rows.jsonl", "--objective", "grpo"]
    text = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False).output
    assert "[image 24x16, 16 tokens]" in text


def test_what_cannot_see_is_refused(tmp_path):
    made, rows = pair("llava"), asked("llava")
    with pytest.raises(ConfigError, match="takes texts alone"):
        NashMDTrainer(made.model, reward_funcs=big, train_dataset=rows,
                      processing_class=made.processor)  # fmt: skip
    with pytest.raises(ConfigError, match="value_model reads no images"):
        PPOTrainer(made.model, big, None, rows, processing_class=made.processor,
                   value_model=classifier())  # fmt: skip
    with pytest.raises(DataError, match="row 0 has images"):
        GRPOTrainer(tiny.model(), big, settings(tmp_path), rows,
                    processing_class=tiny.tokenizer())  # fmt: skip
    with pytest.raises(ConfigError, match="leave rollout_server and max_staleness out"):
        trainer(tmp_path, max_staleness=1)

    def look(word: str) -> str:
        """Looks.

        Args:
            word: what for
        """
        return word

    with pytest.raises(ConfigError, match="tools and environments go with texts alone"):
        trainer(tmp_path, tools=[look])
    gone = tmp_path / "gone.png"
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(gone)
    data = [{"prompt": [{"role": "user", "content": "what?"}], "images": [str(gone)]}] * 2
    run = trainer(tmp_path, data=data)
    gone.unlink()
    with pytest.raises(TrainingError, match=r"row \d, image 0: cannot read"):
        run.train()
    with pytest.raises(DataError, match=r"row 0: .*no chats"):
        read_prompts(asked("llava"), pair("paligemma").processor.tokenizer, None,
                     placer=trainer(tmp_path, "paligemma").objective.draw.placer)  # fmt: skip
