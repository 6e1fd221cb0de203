from __future__ import annotations

import json

import pytest

from topwork.data.formats import Chat, Completion, recognise
from topwork.data.rows import read_rows
from topwork.errors import DataError

ROW = {"prompt": "é\n", "completion": 'a "b", c'}


@pytest.mark.parametrize("kind", ["json", "jsonl", "wrapped", "csv", "tsv", "columns", "list"])
def test_rows_come_the_same_from_every_source(tmp_path, kind):
    rows = [ROW, {"prompt": "2", "completion": "x"}]
    path = tmp_path / f"rows.{ {'wrapped': 'json'}.get(kind, kind) }"
    source = path
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "wrapped":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        quoted = [comma.join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in rows]
        path.write_text("\n".join([comma.join(ROW), *quoted]), encoding="utf-8-sig")
    elif kind == "columns":
        source = {name: [r[name] for r in rows] for name in ROW}
    else:
        source = iter(rows)
    assert [dict(r) for r in read_rows(source)] == rows


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": ', r"a\.jsonl:2: no JSON"),
        ("a.csv", "a,b\n1,2,3\n", "does not have the 2 columns"),
        ("a.csv", "a,b\n1\n", "does not have the 2 columns"),
        ("a.json", "[]", "there is no row"),
        ("a.json", '["text"]', "row 0 is str"),
        ("a.xls", "", "cannot read .xls"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_rows(tmp_path / name)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"nearest: 'train\.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SHARE = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("row", "name", "example"),
    [
        ({"messages": [U, A]}, "messages", Chat([U, A])),
        ({"messages": json.dumps([U, A])}, "messages", Chat([U, A])),
        (SHARE, "sharegpt", Chat([U, A])),
        (
            {**SHARE, "system": "s"}, "sharegpt",
            Chat([{"role": "system", "content": "s"}, U, A]),
        ),
        ({"prompt": "q", "completion": "a"}, "prompt-completion", Completion("q", "a")),
        ({"prompt": [U], "completion": [A]}, "prompt-completion", Chat([U, A], 1)),
        ({"prompt": [U, A, U], "completion": "a"}, "prompt-completion", Chat([U, A, U, A], 3)),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", Chat([U, A], 1)),
        (
            {"instruction": "q", "input": "x", "output": "a"}, "alpaca",
            Chat([{"role": "user", "content": "q\n\nx"}, A], 1),
        ),
    ],
)  # fmt: skip
def test_each_format_is_recognised(row, name, example):
    found = recognise([row])
    assert found.name == name
    assert found.read(row) == example


def test_tool_calls_and_results_keep_their_roles():
    row = {"conversations": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "a"},
    ]}  # fmt: skip
    chat = recognise([row]).read(row)
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"mesages": [U, A]}], "nearest: 'messages'"),
        ([{"text": "a"}, {"text": None}], "row 1 is not in the text format"),
        ([{"messages": [U]}], "no assistant message"),
        ([{"messages": [{"role": "asistant", "content": "a"}]}], "nearest: 'assistant'"),
    ],
)
def test_rows_that_cannot_be_meant_are_named(rows, words):
    with pytest.raises(DataError, match=words):
        recognise(rows).read(rows[0])
