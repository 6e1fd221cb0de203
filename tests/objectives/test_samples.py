from __future__ import annotations

import json

import pytest
import torch

import tiny
import topwork
from topwork import (
    AutoModelForSequenceClassification,
    Config,
    LoraConfig,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from topwork.data.prepare import opening


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
    trainer = run(tmp_path, packing=True, max_length=60)
    assert [len(opening(s)) > 1 for s in trainer.prepared.samples] == [True] * 8
    texts = SFTTrainer(
        tiny.model(), SFTConfig(output_dir=str(tmp_path / "t")), [{"text": "abc"}],
        [{"text": "abcd"}], tiny.tokenizer(), LoraConfig(r=2),
    )  # fmt: skip
    texts.evaluate()
    assert not (tmp_path / "t" / "completions.jsonl").exists()


def pairs(count):
    return [{"prompt": f"ask {i}", "chosen": f" {i} yes", "rejected": " no"} for i in range(count)]


def advised(count):
    return [{"prompt": f"ask {i}", "privileged_context": f"yes {i}"} for i in range(count)]


JUDGED = [{"prompt": f"ask {i}", "completion": f" {i}", "label": i % 2 == 0} for i in range(4)]
CASES = [
    ("DPO", pairs(4), {}, "ask 1"),
    ("KTO", JUDGED, {}, "ask 1"),
    ("ORPO", pairs(4), {}, "ask 1"),
    ("CPO", pairs(4), {}, "ask 1"),
    ("Distillation", tiny.chats(3), {"teacher_model": 1}, None),
    ("GKD", tiny.chats(3), {"teacher_model": 1}, None),
    ("ULD", tiny.chats(3), {"teacher_model": 1}, None),
    ("SelfDistillation", advised(3), {}, "ask 1"),
]


@pytest.mark.parametrize(("name", "rows", "more", "second"), CASES, ids=[c[0] for c in CASES])
def test_every_objective_with_prompts_answers_held_out_ones(name, rows, more, second, tmp_path):
    more = dict(more)
    if "teacher_model" in more:
        more["teacher_model"] = tiny.model(more["teacher_model"])
    if name == "ULD":
        more["teacher_processing_class"] = tiny.tokenizer()
    drawn = {"max_completion_length": 4} if name == "SelfDistillation" else {}
    args = getattr(topwork, f"{name}Config")(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, max_steps=1,
        save_strategy="no", sample_answers=2, disable_tqdm=True, **drawn,
    )  # fmt: skip
    trainer = getattr(topwork, f"{name}Trainer")(
        tiny.model(), args=args, train_dataset=rows, eval_dataset=rows,
        processing_class=tiny.tokenizer(), peft_config=LoraConfig(r=2), **more,
    )  # fmt: skip
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]]
    assert [line["step"] for line in lines] == [1, 1]
    wanted = second or trainer.tokenizer.decode(
        trainer.tokenizer.apply_chat_template(rows[1]["messages"][:1], add_generation_prompt=True)
    )
    assert lines[1]["prompt"] == wanted
    prompt = trainer.tokenizer.encode(wanted)
    out = trainer.model.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=2
    )
    assert lines[1]["completions"] == [trainer.tokenizer.decode(out[0, len(prompt) :].tolist())]
    assert "Answers over time" in (tmp_path / "report.html").read_text()


def test_models_that_write_nothing_are_not_asked(tmp_path):
    config = Config(**{**tiny.model().config.to_dict(), "num_labels": 1})
    scores = AutoModelForSequenceClassification.from_config(config)
    args = RewardConfig(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, max_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    RewardTrainer(
        scores, args, pairs(4), pairs(2), tiny.tokenizer(), peft_config=LoraConfig(r=2)
    ).train()
    assert not (tmp_path / "completions.jsonl").exists()


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="sample_answers=-1"):
        SFTConfig(sample_answers=-1)
    with pytest.raises(ValueError, match="sample_answers=-1"):
        topwork.DPOConfig(sample_answers=-1)


@pytest.mark.parametrize("writes", [True, False])
def test_encoder_decoders_answer_where_evaluation_writes(tmp_path, writes):
    torch.manual_seed(0)
    config = Config(
        model_type="t5", vocab_size=259, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    words = tiny.tokenizer()
    rows = [
        {"input_ids": words(f"ask {i}")["input_ids"] + [0, 0], "labels": [5, 6, 2],
         "attention_mask": [1] * 5 + [0, 0]}
        for i in range(4)
    ]  # fmt: skip
    args = topwork.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, max_steps=1,
        save_strategy="no", sample_answers=2, disable_tqdm=True, predict_with_generate=writes,
    )  # fmt: skip
    model = topwork.AutoModelForSeq2SeqLM.from_config(config)
    topwork.Seq2SeqTrainer(
        model, args, None, rows, rows, words, compute_metrics=lambda _: {}
    ).train()
    path = tmp_path / "completions.jsonl"
    assert path.exists() == writes
    if writes:
        lines = [json.loads(x) for x in path.read_text().split("\n")[:-1]]
        assert [line["prompt"] for line in lines] == ["ask 0", "ask 1"]
        out = model.generate(
            torch.tensor([words("ask 0")["input_ids"]]), max_new_tokens=64, do_sample=False,
            eos_token_id=2,
        )  # fmt: skip
        assert lines[0]["completions"] == [words.decode(out[0].tolist())]
