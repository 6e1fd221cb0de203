"""Every adapter method in the engine, beside rows of the base, against `generate` row by row."""

from __future__ import annotations

import pytest
import torch

import topwork
from helpers_generation import finish
from parity.bases import our_base, randomise
from parity.test_methods import ROWS
from topwork.errors import ConfigError
from topwork.generation.engine import Engine
from topwork.peft import get_peft_model

TEXTS = [list(range(9, 23)), [3, 4, 5, 6], [1], list(range(19, 2, -1)), [7, 3, 4, 20, 11]]
REFUSED = {"LilyConfig": "mixes by all tokens of a pass", "ShadowConfig": "has a shadow"}
CASES = [row for row in ROWS if row.base not in ("convs", "heads")]
FIRST = {row.config: row for row in reversed(CASES)}
CASES = [
    pytest.param(row, marks=() if row is FIRST[row.config] else pytest.mark.slow) for row in CASES
]


def adapted(row, folder):
    model = get_peft_model(our_base(row.base, folder), getattr(topwork, row.config)(**row.options))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("row", CASES, ids=str)
def test_rows_of_the_method_and_of_the_base_are_as_in_generate(row, tmp_path):
    model = adapted(row, tmp_path)
    if row.config in REFUSED:
        with pytest.raises(ConfigError, match=f"'default' {REFUSED[row.config]}.* model.generate"):
            Engine(model).submit(TEXTS[0])
        return
    task = 1 if row.config == "PolyConfig" else None
    engine = Engine(model, page_size=4, piece=8, step_tokens=24)
    names = ["default", None, "default", "default", None]
    options = {"max_new_tokens": 6, "eos_token_id": None}
    asked = [
        engine.submit(ids, adapter=name, task_id=task if name else None, **options)
        for ids, name in zip(TEXTS, names)
    ]
    finish(engine)
    tasks = {} if task is None else {"task_ids": torch.tensor([task])}
    for ids, name, request in zip(TEXTS, names, asked):
        assert request.error is None
        with model.disable_adapter() if name is None else model.use_adapter(name):
            wanted = model.generate(torch.tensor([ids]), **options, **(tasks if name else {}))
        assert request.ids == wanted[0].tolist()
