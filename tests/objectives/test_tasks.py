"""Rows that say their task, for adapters that learn by task."""

from __future__ import annotations

import pytest
import torch

import tiny
from topwork import MultitaskPromptTuningConfig, PolyConfig, SFTConfig, SFTTrainer, get_peft_model
from topwork.errors import ConfigError, DataError

POLY = PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["q_proj"], init_weights=False)
PROMPT = MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, task_type="CAUSAL_LM")
TASKS = (0, 2, 2, 0)


def run(folder, config, tasks=TASKS, **options):
    torch.manual_seed(0)
    rows = [{**row, "task_ids": task} for row, task in zip(tiny.chats(4), tasks)]
    args = SFTConfig(
        output_dir=str(folder), max_steps=1, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, learning_rate=0.1, **options,
    )  # fmt: skip
    model = get_peft_model(tiny.model(), config)
    return SFTTrainer(model, args, rows, processing_class=tiny.tokenizer())


@pytest.mark.parametrize("config", [POLY, PROMPT], ids=["poly", "prompt"])
def test_the_loss_is_that_of_the_models_call_with_the_rows_tasks(tmp_path, config):
    made = run(tmp_path, config)
    model, objective = made.model.eval(), made.objective
    samples = [made.train_data[i] for i in range(4)]
    batch = objective.assemble(model, [samples])[0]
    order = sorted(samples, key=len, reverse=True)
    assert batch.tasks.tolist() == [TASKS[sample.row] for sample in order]
    found = objective.loss(model, batch).over([objective.weight(batch)])
    total = 0.0
    for sample in samples:
        ids, marks = torch.from_numpy(sample.ids)[None].long(), torch.from_numpy(sample.trained)
        task = torch.tensor([sample.task])
        labels = ids.masked_fill(~marks, -100)
        total += model(ids, labels=labels, task_ids=task).loss * int(marks[1:].sum())
    torch.testing.assert_close(found, total / len(batch.targets))


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_keep_their_tasks_and_only_those_are_learnt(tmp_path, strategy):
    made = run(tmp_path, POLY, packing=True, packing_strategy=strategy, max_length=90)
    logits = made.model.base_model.model.model.layers[0].self_attn.q_proj.poly_router["default"]
    before = logits.module_logits.detach().clone()
    made.train()
    moved = (logits.module_logits != before).any(1).tolist()
    assert moved == [True, False, True]


def test_rows_without_tasks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="POLY learns by task: its rows need a column `task_ids`"):
        run(tmp_path, POLY, tasks=[None] * 4).train()
    with pytest.raises(DataError, match="row 1: task_ids=-1 must be the number of a task"):
        run(tmp_path, POLY, tasks=(0, -1, 2, 0))
