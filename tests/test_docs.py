"""The code in README, docs and examples: it parses, and every name that it imports is there."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def check_imports(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("topwork"):
            home = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(home, alias.name), f"{node.module}.{alias.name}"


@each_page
def test_code_in_the_docs_parses_and_its_imports_exist(page):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE):
        check_imports(textwrap.dedent(block))


@each_page
def test_links_in_the_docs_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_import_what_is_there(example):
    check_imports(example.read_text(encoding="utf-8"))
