from __future__ import annotations

import pytest

import tiny
from topwork.data.answers import prepare_answers, unpaired
from topwork.data.formats import recognise
from topwork.data.preferences import JUDGED, PAIRS, STEPS
from topwork.data.prepare import Marking
from topwork.errors import DataError

USER, YES, NO = (
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "It is."},
    {"role": "assistant", "content": "Is it not?"},
)
MARKING = Marking(end_token=2)


def prepared(rows, known=PAIRS, tokenizer=None, limit=None, whole=False):
    marking = Marking(max_length=limit, end_token=2)
    return prepare_answers(rows, tokenizer or tiny.tokenizer(), marking, known, whole)


def texts(sample, trained=True):
    """The prompt, and what each answer trains."""
    decode = tiny.tokenizer().decode
    answers = [decode(a.ids[a.trained] if trained else a.ids) for a in sample.answers]
    return decode(sample.prompt), *answers


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Is it?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": "It is.", "rejected": "Is it not?"},
    ],
)
def test_every_way_to_write_a_pair_of_chats_is_one(row):
    (sample,) = prepared([row]).samples
    prompt = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nI"
    # The answers share their "I", which each of them trains: the prompt ends before it.
    assert texts(sample) == (prompt[:-1], "It is.<|im_end|>", "Is it not?<|im_end|>")


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "a b", "chosen": " c", "rejected": " d"}, "a b", (" c", " d")),
        ({"chosen": "the sky is blue", "rejected": "the sky is black"}, "the sky is",
         (" blue", " black")),
        ({"chosen": "yes", "rejected": "no"}, "", ("es", "o")),
        ({"chosen": "q: yes, it is", "rejected": "q: yes"}, "q:", (" yes, it is", " yes")),
    ],
)  # fmt: skip
def test_texts_part_at_the_end_of_a_word_and_end_with_the_end_token(row, prompt, answers):
    (sample,) = prepared([row]).samples
    found = texts(sample)
    assert found[0] == prompt
    if prompt:
        assert found[1:] == tuple(f"{a}<|im_end|>" for a in answers)


def test_later_turns_are_read_and_only_the_assistant_is_trained():
    row = {"prompt": [USER], "chosen": [YES, USER, YES], "rejected": [NO]}
    (sample,) = prepared([row]).samples
    assert texts(sample)[1] == "It is.<|im_end|>It is.<|im_end|>"
    assert "user" in texts(sample, trained=False)[1]


def test_an_answer_ends_with_its_last_trained_token_unless_it_is_read_whole():
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    (cut,), (whole,) = (prepared([row], whole=w).samples for w in (False, True))
    assert texts(cut, trained=False)[1] == "It is.<|im_end|>"
    assert texts(whole, trained=False) == (
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nI",
        "t is.<|im_end|>\n",
        "s it not?<|im_end|>\n",
    )


def test_long_answers_are_cut_and_lost_rows_counted():
    rows = [
        {"prompt": "abc", "chosen": " de", "rejected": " fghijkl"},
        {"prompt": "abcdefghij", "chosen": " k", "rejected": " l"},
        {"prompt": "ab", "chosen": " c", "rejected": " d"},
        {"prompt": "ab", "chosen": " same", "rejected": " same"},
    ]
    found = prepared(rows, limit=8)
    assert [s.row for s in found.samples] == [0, 2]
    assert found.cut == 1
    assert found.unterminated == 1
    assert found.dropped == {
        "with an answer that lies beyond max_length=8": 1,
        "whose answers are the same tokens": 1,
    }
    longer = prepared(rows, limit=8, whole=True)
    assert longer.dropped["longer than max_length=8"] == 2
    with pytest.raises(DataError, match="no row is left"):
        prepared(rows[1:2], limit=8)


def test_margins_and_labels_are_kept():
    rows = [{"chosen": "a b", "rejected": "a c", "margin": m} for m in (1, "0.5", None)]
    assert [s.value for s in prepared(rows).samples] == [1.0, 0.5, None]
    labels = [True, 0, "true", "False", 1.0]
    rows = [{"prompt": "a", "completion": " b", "label": x} for x in labels]
    assert [s.value for s in prepared(rows, JUDGED).samples] == [1, 0, 1, 0, 1]


def test_pairs_become_single_judged_answers():
    pairs = prepared([{"prompt": "a", "chosen": " b", "rejected": " c"}], JUDGED)
    singles = unpaired(pairs)
    assert [(s.value, texts(s)[1]) for s in singles.samples] == [
        (1.0, " b<|im_end|>"), (0.0, " c<|im_end|>"),
    ]  # fmt: skip
    assert singles.tokens == pairs.apart


def test_equal_data_has_an_equal_fingerprint():
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c", "margin": 1}]
    one = prepared(rows).fingerprint
    assert prepared(rows).fingerprint == one
    assert prepared([{**rows[0], "margin": 2}]).fingerprint != one
    assert prepared([{**rows[0], "rejected": " d"}]).fingerprint != one


@pytest.mark.parametrize(
    ("rows", "known", "error"),
    [
        ([{"choosen": "a", "rejected": "b"}], PAIRS, "nearest: 'chosen'"),
        ([{"chosen": "a b", "rejected": "a c"}, {"chosen": 1}], PAIRS, "row 1 is not in"),
        ([{"chosen": [USER, YES], "rejected": [USER]}], PAIRS, "part ways"),
        ([{"prompt": "a", "chosen": " b", "rejected": ""}], PAIRS, "an answer is empty"),
        ([{"chosen": "a b", "rejected": "a c", "margin": "big"}], PAIRS, "is no number"),
        ([{"prompt": "a", "completion": "b", "label": "maybe"}], JUDGED, "neither true nor false"),
        ([{"chosen": [USER, YES], "rejected": [USER, {"role": "gott", "content": ""}]}], PAIRS,
         "role 'gott'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(rows, known, error):
    with pytest.raises(DataError, match=error):
        prepared(rows, known)


def test_steps_need_a_label_each():
    found = recognise(
        [{"prompt": "a", "completions": ["b", "c"], "labels": [True, 0]}], known=STEPS
    )
    assert found.read({"prompt": "a", "completions": ["b"], "labels": ["yes"]}).labels == [1.0]
    with pytest.raises(DataError, match="2 completions, but 1 labels"):
        found.read({"prompt": "a", "completions": ["b", "c"], "labels": [1]})


def test_a_single_question_needs_no_template():
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    (sample,) = prepared([row], tokenizer=tiny.tokenizer(None)).samples
    assert "### Instruction:\nIs it?" in texts(sample)[0]
