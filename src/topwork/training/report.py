"""The page of a run, `report.html`: curves, what was trained on, answers over time. It needs no
other file, no script and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from topwork.training.plan import looked_at
from topwork.training.plot import Point, bars_svg, curves_svg
from topwork.training.state import TrainerState

REPORT, COMPLETIONS = "report.html", "completions.jsonl"
FIRST = ("loss", "reward", "learning_rate", "grad_norm")  # curves that come first
NO_CURVE = frozenset({
    "step", "epoch", "num_tokens", "runtime", "samples_per_second", "steps_per_second",
    "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second",
})  # fmt: skip
SHOWN = 24  # entries of completions.jsonl, evenly over the run
BINS = 24
HEADING = "## Training"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ddd}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(360px,1fr));gap:1rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
padding:.25rem .6rem;border-bottom:1px solid #eee}pre,td.text{white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.45 ui-monospace,monospace}pre{background:#f6f6f4;padding:.8rem}
svg{width:100%;height:auto}@media(prefers-color-scheme:dark){body{background:#16181a;color:#ddd}
pre{background:#22262a}svg text{fill:#ccc}svg path{stroke:#444}td,th{border-color:#333}}
"""


@dataclass(frozen=True)
class Facts:
    """What a page tells beside the curves. `sizes`: tokens of each sample of the training data."""

    title: str
    notes: Sequence[str]
    plan: Sequence[str]
    sizes: Sequence[int]
    settings: Mapping[str, Any]


def write_report(home: Path, history: Sequence[Mapping[str, Any]], facts: Facts) -> Path:
    """Write `home`/report.html from a state's `log_history`, and completions.jsonl if it is there.

    The page appears whole or not at all.
    """
    entries = _completions(home / COMPLETIONS)
    body = [
        f"<h1>{escape(facts.title)}</h1>",
        _summary(history),
        '<h2>Curves</h2><div class="grid">',
        *(curves_svg(curves, name) for name, curves in sorted_curves(history).items()),
        "</div>",
        "<h2>Data</h2>",
        f"<pre>{escape(chr(10).join(facts.notes))}</pre>" if facts.notes else "",
        f'<div class="grid">{_lengths(facts.sizes)}</div>',
        "<h2>Answers over time</h2>" if entries else "",
        *(_answers(entry) for entry in entries),
        "<h2>Run</h2>",
        f"<pre>{escape(chr(10).join(facts.plan))}</pre>",
        _table(
            ("setting", "value"),
            [(k, json.dumps(v, default=str)) for k, v in facts.settings.items()],
        ),
    ]
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(facts.title)}'
        '</title><meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head><body>{chr(10).join(body)}</body></html>\n"
    )
    path, stage = home / REPORT, home / (REPORT + ".part")
    stage.write_text(text, encoding="utf-8")
    return stage.replace(path)


def sorted_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Chart → curve → points; a metric and its evaluations ("eval_…") share a chart."""
    charts: dict[str, dict[str, list[Point]]] = {}
    for entry in history:
        for name, value in entry.items():
            chart = name.removeprefix("eval_")
            if chart in NO_CURVE or not isinstance(value, (int, float)) or value != value:
                continue
            curves = charts.setdefault(chart, {})
            curves.setdefault(name, []).append((float(entry["step"]), float(value)))
    order = {name: i for i, name in enumerate(FIRST)}
    return dict(sorted(charts.items(), key=lambda c: (order.get(c[0], len(order)), c[0])))


def facts_of(trainer: Any, plan: Sequence[str]) -> Facts:
    """Of a trainer's run, before its first step: a stream forgets what it has read."""
    args, data, size = trainer.args, trainer.train_data, trainer.objective.size
    title = args.run_name or f"{type(trainer.objective).__name__} · {Path(args.output_dir).name}"
    sizes = [size(data[i]) for i in looked_at(data, 20_000)]
    return Facts(title, trainer.notes, plan, sizes, args.chosen())


def keep_until(step: int, home: Path) -> None:
    """Take out of completions.jsonl what an earlier run, or this one beyond `step`, has left."""
    path = home / COMPLETIONS
    if path.is_file():
        kept = [line for line in _lines(path) if step and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def add_run(folder: Path, state: TrainerState, facts: Facts) -> None:
    """Add to the model card in `folder` what the model was trained on and came to."""
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {facts.title}\n"
    before = before.partition(HEADING)[0].rstrip()
    last: dict[str, Any] = {}
    for entry in state.log_history:
        last |= {k: v for k, v in entry.items() if k.endswith(("loss", "accuracy", "reward"))}
    data = [note for note in facts.notes if note.startswith(("data:", "evaluation"))]
    rows = [
        ("Steps", f"{state.global_step:,} (epoch {state.epoch:.2f})"),
        ("Tokens seen", f"{state.num_input_tokens_seen:,}"),
        *((name, _short(value)) for name, value in sorted(last.items())),
        *((name, json.dumps(value, default=str)) for name, value in facts.settings.items()),
    ]
    lines = [*data, "", "| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows)]
    text = f"{before}\n\n{HEADING}\n\n{chr(10).join(lines)}\n"
    card.write_text(text, encoding="utf-8")


def _summary(history: Sequence[Mapping[str, Any]]) -> str:
    """The last figures of each kind."""
    last: dict[str, Any] = {}
    for entry in history:
        last |= entry
    order = sorted(last, key=lambda k: (k not in ("step", "epoch", "loss", "eval_loss"), k))
    return _table(("last", ""), [(name, _short(last[name])) for name in order])


def _lengths(sizes: Sequence[int]) -> str:
    if not len(sizes):
        return ""
    counts, edges = np.histogram(sizes, bins=min(BINS, max(1, len(set(sizes)))))
    title = f"tokens of {len(sizes):,} samples: mean {np.mean(sizes):,.0f}, most {max(sizes):,}"
    return bars_svg(counts.tolist(), edges.tolist(), title)


def _completions(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = _lines(path)
    if not lines:
        return []
    chosen = sorted({round(i) for i in np.linspace(0, len(lines) - 1, SHOWN)})
    return [json.loads(lines[i]) for i in chosen]


def _lines(path: Path) -> list[str]:
    """The file's lines; other ends of lines may stand within JSON's strings."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def _answers(entry: Mapping[str, Any]) -> str:
    """One prompt's answers at one step, with what they were worth."""
    prompt = entry["prompt"]
    shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    rewards = entry.get("rewards") or [None] * len(entry["completions"])
    rows = [
        (text, "" if r is None else _short(r)) for text, r in zip(entry["completions"], rewards)
    ]
    return (
        f"<details><summary>step {entry['step']}: {escape(shown[:160])}</summary>"
        f"<pre>{escape(shown)}</pre>{_table(('answer', 'reward'), rows, text=True)}</details>"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], text: bool = False) -> str:
    kind = ' class="text"' if text else ""
    lines = ["".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_short(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
