from __future__ import annotations

import json

import pytest
import torch

import tiny
from topwork import LoraConfig, SFTConfig, SFTTrainer
from topwork.data.prepare import Marking, prepare
from topwork.data.rows import LazyRows
from topwork.data.stream import Stream
from topwork.errors import ConfigError, DataError


def stream(rows, size, seed=None, chunk=4):
    tokenizer = tiny.tokenizer()
    return Stream(
        rows, size, lambda r: prepare(r, tokenizer, Marking()), lambda p: p.samples, seed, chunk
    )


def train(home, rows, **more):
    torch.manual_seed(1)
    values = {"output_dir": str(home), "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1,
              "per_device_train_batch_size": 2, "disable_tqdm": True, "shuffle": False}  # fmt: skip
    return SFTTrainer(
        tiny.model(), SFTConfig(**{**values, **more}), rows, None, tiny.tokenizer(),
        LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip


def losses(trainer):
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


class Endless:
    """Chats without an end; counts how many were asked for."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        while True:
            self.given += 1
            yield tiny.chats(self.given % 7 + 1)[-1]


def test_samples_come_in_order_through_several_passes_and_old_ones_are_forgotten():
    found = stream(tiny.chats(10), 35)
    assert [found[i].row for i in range(35)] == [i % 10 for i in range(35)]
    assert found.passes == 3
    assert len(found._kept) <= 8
    assert found[3].row == 3  # by reading from the start


def test_each_chunk_is_shuffled_and_each_pass_anew():
    found = stream(tiny.chats(8), 16, seed=3)
    rows = [found[i].row for i in range(16)]
    assert [sorted(rows[at : at + 4]) for at in (0, 4, 8, 12)] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert rows[:8] != rows[8:]
    assert rows == [s.row for s in stream(tiny.chats(8), 16, seed=3)]


def test_a_streamed_run_equals_one_that_holds_its_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in tiny.chats(12)))
    held, streamed = train(tmp_path / "a", path), train(tmp_path / "b", path, streaming=True)
    held.train()
    streamed.train()
    assert losses(held) == losses(streamed)


def test_rows_without_an_end_are_read_as_they_are_needed_and_a_resumed_run_goes_on(tmp_path):
    rows = Endless()
    whole = train(tmp_path / "a", rows, save_strategy="steps", save_steps=2)
    assert rows.given == 1000
    whole.train()
    again = train(tmp_path / "b", Endless())
    again.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-4")
    assert losses(again)[4:] == losses(whole)[4:]
    assert any("first 1,000 rows" in note for note in whole.notes)


def test_what_a_stream_loses_is_counted_and_told(tmp_path, capsys):
    rows = [*tiny.chats(3), tiny.chat("x" * 80, "y"), *tiny.chats(2)]
    run = train(tmp_path, rows, streaming=True, max_length=60, disable_tqdm=False)
    run.train()
    text = capsys.readouterr().err
    assert "1 rows dropped, whose trained part lies beyond max_length=60" in text
    assert "stream: 18 rows read, 2 times to their end; 15 kept, 3 dropped" in text


def test_packs_are_made_of_each_chunk(tmp_path):
    run = train(tmp_path, iter(tiny.chats(30)), packing=True, max_length=100, max_steps=2)
    assert all(isinstance(pack, tuple) for pack in run.train_data[:4])
    run.train()


def test_rows_that_end_and_cannot_be_read_again_are_an_error():
    with pytest.raises(DataError, match=r"ended after 5 of them.*5 samples of the 9"):
        list(stream(iter(tiny.chats(5)), 9))


def test_a_bad_row_is_named_by_its_chunk():
    rows = [*tiny.chats(6), {"messages": 3}]
    with pytest.raises(DataError, match=r"rows 4 to 6, numbered from there: .*row 2"):
        list(stream(rows, 9))


def test_streaming_needs_the_number_of_steps(tmp_path):
    with pytest.raises(ConfigError, match="max_steps"):
        train(tmp_path, tiny.chats(3), streaming=True, max_steps=-1)


def test_files_are_read_line_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    rows = iter(LazyRows(path))
    assert [next(rows), next(rows)] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        next(rows)
    with pytest.raises(DataError, match="no such file"):
        LazyRows(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="weights are not streamed"):
        LazyRows([{"path": str(path), "weight": 2}])


def test_saving_amid_a_stream_does_not_read_it_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("topwork.data.stream.Stream.__init__.__defaults__", (None, 4))
    rows = Endless()
    run = train(tmp_path, rows, max_steps=12, save_strategy="steps", save_steps=4)
    run.train()
    run.save_model()
    assert run.train_data.rows == rows.given <= 12 * 2 + 4
