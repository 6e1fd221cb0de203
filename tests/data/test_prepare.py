from __future__ import annotations

import pytest
import torch

import tiny
from topwork.data.packing import collate, pack
from topwork.data.prepare import Marking, marked_text, prepare
from topwork.errors import DataError

END = "<|im_end|>"


def trained(rows, template=tiny.CHATML, **marking):
    tokenizer = tiny.tokenizer(template)
    options = {"end_token": tokenizer.eos_token_id, **marking}
    found = prepare(rows, tokenizer, Marking(**options))
    return found, [
        "".join(t for t, mark in marked_text(s, tokenizer) if mark) for s in found.samples
    ]


def test_every_answer_of_a_chat_is_trained_with_its_end():
    found, texts = trained([tiny.chat("hi", "yo", "more", "ok")])
    assert texts == [f"yo{END}ok{END}"]
    assert found.unterminated == 0


def test_only_the_completion_of_a_conversational_row_is_trained():
    row = tiny.chat("hi", "yo", "more", "ok")["messages"]
    _, texts = trained([{"prompt": row[:3], "completion": row[3:]}])
    assert texts == [f"ok{END}"]


def test_completions_and_texts_end_in_the_end_token():
    assert trained([{"prompt": "a b", "completion": " c"}])[1] == [f" c{END}"]
    assert trained([{"text": "a b"}])[1] == [f"a b{END}"]
    assert trained([{"prompt": "a", "completion": "b"}], completion_only=False)[1] == [f"ab{END}"]


def test_alpaca_rows_train_without_a_template_too():
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert trained([row])[1] == [f"3{END}"]
    assert trained([row], template=None)[1] == [f"3{END}"]
    with pytest.raises(DataError, match="no chat template"):
        trained([tiny.chat("a", "b", "c", "d")], template=None)


def test_cut_and_dropped_rows_are_counted_with_the_reason():
    rows = [tiny.chat("q", "a" * n) for n in (3, 90)] + [tiny.chat("q" * 90, "a")]
    found, _ = trained(rows, max_length=60)
    assert (len(found), found.cut) == (2, 1)
    assert found.dropped == {"whose trained part lies beyond max_length=60": 1}
    assert found.unterminated == 1


def test_nothing_left_to_train_is_an_error_that_says_why():
    with pytest.raises(DataError, match="1 whose trained part lies beyond max_length=10"):
        trained([tiny.chat("q" * 50, "a")], max_length=10)


def test_bad_rows_are_named_together():
    rows = [tiny.chat("q", "a"), {"messages": [{"role": "user", "content": "x"}]}] * 2
    with pytest.raises(DataError, match=r"2 of 4 rows cannot be used: row 1: .*row 3"):
        trained(rows)


def test_given_tokens_keep_their_labels():
    found, _ = trained([{"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}])
    assert found.samples[0].trained.tolist() == [False, True, False]
    for row, words in (
        ({"input_ids": [5, 999]}, "outside the vocabulary"),
        ({"input_ids": [5, 6], "labels": [5, 7]}, "labels must be"),
        ({"input_ids": [5, 6], "labels": [5]}, "1 labels"),
    ):
        with pytest.raises(DataError, match=words):
            trained([row])


def test_a_batch_predicts_each_trained_token_from_the_one_before_it():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, -100]},
            {"input_ids": [8, 9, 10, 11], "labels": [-100, -100, 10, 11]}]  # fmt: skip
    found, _ = trained(rows)
    batch = collate(found.samples)
    assert batch.input_ids.tolist() == [[8, 9, 10, 11, 5, 6, 7]]
    assert batch.lengths == (4, 3)
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [10, 11, 6]
    assert batch.owners.tolist() == [0, 0, 1]
    assert batch.rows == (1, 0)


def test_packs_hold_every_token_once_and_never_overflow():
    torch.manual_seed(0)
    rows = [{"input_ids": [3] * n} for n in torch.randint(2, 40, (60,)).tolist()]
    samples = trained(rows)[0].samples
    for strategy in ("bfd", "wrapped"):
        packs = pack(samples, 50, strategy)
        sizes = [sum(len(s) for s in p) for p in packs]
        assert max(sizes) <= 50
        assert sum(sizes) == sum(len(s) for s in samples)
    whole = [s.row for p in pack(samples, 50) for s in p]
    assert sorted(whole) == list(range(60))
    assert len(pack(samples, 50)) <= 1.1 * sum(len(s) for s in samples) / 50 + 1
