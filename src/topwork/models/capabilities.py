"""Which families there are and what each can do, told by the code itself."""

from __future__ import annotations

from topwork.models import families
from topwork.models.auto import tasks_of
from topwork.weights.gguf import MODEL_TYPES

TASKS = (
    "base", "causal-lm", "sequence-classification", "token-classification", "masked-lm",
    "question-answering", "multiple-choice", "seq2seq-lm", "speech-seq2seq", "ctc",
    "audio-classification",
    "image-classification", "zero-shot-image-classification",
    "image-text-to-text", "visual-question-answering",
)  # fmt: skip


def capabilities() -> dict[str, dict[str, bool]]:
    """For each model_type: each task of `TASKS`, and "gguf", whether it can."""
    found = {}
    for name in families.NAMES:
        tasks = tasks_of(name)
        found[name] = {task: task in tasks for task in TASKS} | {"gguf": name in MODEL_TYPES}
    return found


def families_page() -> str:
    """`docs/families.md`."""
    table = capabilities()
    columns = [c for c in (*TASKS, "gguf") if any(row[c] for row in table.values())]
    lines = [
        "# Families",
        "",
        "Which `model_type` loads for which task, and from .gguf files. Written by "
        "`topwork models --markdown > docs/families.md`.",
        "",
        f"| model_type | {' | '.join(columns)} |",
        f"|---|{'|'.join(':-:' for _ in columns)}|",
    ]
    for name, row in table.items():
        lines.append(f"| {name} | {' | '.join('✓' if row[c] else '' for c in columns)} |")
    lines += ["", "What sets each apart:", ""]
    for name in table:
        first = (families.family(name).__doc__ or "").strip().splitlines()[0]
        lines.append(f"- `{name}`: {first}")
    return "\n".join(lines) + "\n"
