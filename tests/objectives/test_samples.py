from __future__ import annotations

import json

import pytest
import torch

import tiny
from topwork import LoraConfig, SFTConfig, SFTTrainer


def run(home, **more):
    args = SFTConfig(
        output_dir=str(home), learning_rate=1e-2, num_train_epochs=2, eval_strategy="epoch",
        logging_steps=1, disable_tqdm=True, save_strategy="no", **more,
    )  # fmt: skip
    torch.manual_seed(1)  # of A's random start
    trainer = SFTTrainer(
        tiny.model(), args, tiny.chats(8), tiny.chats(3), tiny.tokenizer(), LoraConfig(r=2)
    )
    trainer.train()
    return trainer


def test_held_out_prompts_are_answered_at_each_evaluation(tmp_path):
    trainer = run(tmp_path, sample_answers=2)
    lines = [json.loads(x) for x in (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    prompt = trainer.tokenizer.apply_chat_template(
        tiny.chats(1)[0]["messages"][:1], add_generation_prompt=True
    )
    assert lines[0]["prompt"] == trainer.tokenizer.decode(prompt)
    out = trainer.model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    assert lines[2]["completions"] == [trainer.tokenizer.decode(out[0, len(prompt) :].tolist())]
    assert "Answers over time" in (tmp_path / "report.html").read_text()


def test_answering_changes_nothing_of_the_training(tmp_path):
    asked, not_asked = run(tmp_path / "a"), run(tmp_path / "b", sample_answers=0)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (asked, not_asked)]
    assert losses[0] == losses[1]
    assert not (tmp_path / "b" / "completions.jsonl").exists()


def test_a_new_run_drops_what_an_old_one_answered(tmp_path):
    run(tmp_path, sample_answers=1)
    run(tmp_path, sample_answers=1)
    assert len((tmp_path / "completions.jsonl").read_text().split("\n")[:-1]) == 2


def test_rows_without_a_prompt_are_passed_over(tmp_path):
    from topwork.objectives.samples import prompt_of

    trainer = run(tmp_path, packing=True, max_length=60)
    assert [len(prompt_of(s)) > 1 for s in trainer.prepared.samples] == [True] * 8
    texts = SFTTrainer(
        tiny.model(), SFTConfig(output_dir=str(tmp_path)), [{"text": "abc"}], None,
        tiny.tokenizer(), LoraConfig(r=2),
    )  # fmt: skip
    assert len(prompt_of(texts.prepared.samples[0])) <= 1


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="sample_answers=-1"):
        SFTConfig(sample_answers=-1)
