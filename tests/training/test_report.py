from __future__ import annotations

import json
from html.parser import HTMLParser

from topwork.training.report import Facts, keep_until, sorted_curves, write_report

HISTORY = [
    {"loss": 2.0, "learning_rate": 1e-3, "memory": 5, "epoch": 0.5, "step": 10},
    {"eval_loss": 1.5, "eval_runtime": 2.0, "epoch": 0.5, "step": 10},
    {"loss": 1.0, "learning_rate": 5e-4, "memory": 6, "epoch": 1.0, "step": 20},
]


class Page(HTMLParser):
    """What a page says and what it asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.words, self.asks = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.asks += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def facts(**more):
    values = {"title": "a <run>", "notes": ["10 of 11 rows kept"], "plan": ["memory 1 GB"],
              "sizes": [3, 4, 4, 90], "settings": {"learning_rate": 1e-3}}  # fmt: skip
    return Facts(**{**values, **more})


def test_the_page_holds_curves_data_and_settings_and_asks_for_nothing(tmp_path):
    page = Page(write_report(tmp_path, HISTORY, facts()).read_text())
    text = " ".join(page.words)
    for words in (
        "a <run>",
        "10 of 11 rows kept",
        "memory 1 GB",
        "tokens of 4 samples",
        "eval_loss",
    ):
        assert words in text
    assert page.tags.count("polyline") == 4  # loss, its evaluation, learning rate, memory
    assert not page.asks
    assert "script" not in page.tags


def test_a_metric_shares_its_chart_with_its_evaluations():
    charts = sorted_curves(HISTORY)
    assert list(charts) == ["loss", "learning_rate", "memory"]
    assert charts["loss"] == {"loss": [(10, 2.0), (20, 1.0)], "eval_loss": [(10, 1.5)]}


def test_answers_are_shown_evenly_over_the_run_and_escaped(tmp_path):
    lines = [
        {
            "step": i,
            "prompt": f"p{i} <b>",
            "completions": ["<i>x</i>", "y"],
            "rewards": [[1.0], [0.5]],
        }
        for i in range(100)
    ]
    (tmp_path / "completions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_report(tmp_path, HISTORY, facts()).read_text())
    assert page.tags.count("details") == 24
    assert {"b", "i"}.isdisjoint(page.tags)
    assert any("step 0:" in w for w in page.words)
    assert any("step 99:" in w for w in page.words)


def test_ends_of_lines_within_an_answer_are_its_own(tmp_path):
    line = {"step": 1, "prompt": "p", "completions": ["a\x85b\u2028c\x1cd"]}
    text = json.dumps(line, ensure_ascii=False) + "\n"
    (tmp_path / "completions.jsonl").write_text(text)
    write_report(tmp_path, HISTORY, facts())
    keep_until(1, tmp_path)
    assert (tmp_path / "completions.jsonl").read_text() == text


def test_a_run_without_any_log_still_has_a_page(tmp_path):
    page = Page(write_report(tmp_path, [], facts(sizes=[], notes=[])).read_text())
    assert "polyline" not in page.tags
