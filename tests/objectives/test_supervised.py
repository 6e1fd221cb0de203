"""The Trainer for any model with a loss of its own: what goes in and comes out, and refusals."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from topwork import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Config,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    LoraConfig,
    PeftModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_peft_model,
)
from topwork.errors import ConfigError, DataError

BERT = {
    "model_type": "bert", "vocab_size": 259, "hidden_size": 24, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
    "num_labels": 3, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
ARGS = {
    "learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 4,
    "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


def bert(auto=AutoModelForSequenceClassification, **changes):
    torch.manual_seed(0)
    return auto.from_config(Config(**{**BERT, **changes}))


def texts(count=10, tags=False):
    """Rows whose class is in their first token."""
    random = np.random.default_rng(1)
    made = []
    for i in range(count):
        ids = [10 + i % 3, *random.integers(20, 200, int(random.integers(2, 12))).tolist()]
        made.append({"input_ids": ids, "name": f"row {i}"})
        made[-1] |= {"labels": [t % 3 for t in ids]} if tags else {"label": i % 3}
    return made


def accuracy(found):
    predictions, labels = found
    return {"accuracy": (predictions.argmax(-1) == labels).mean()}


def trainer(folder, model=None, rows=None, evals=None, kind=Trainer, more=None, **options):
    args = TrainingArguments(output_dir=str(folder), **{**ARGS, **options})
    more = {"processing_class": tiny.tokenizer(), **(more or {})}
    return kind(model or bert(), args, train_dataset=rows or texts(), eval_dataset=evals, **more)


def losses(run):
    return [e["loss"] for e in run.state.log_history if "loss" in e]


class Regression(nn.Module):
    """A plain module; `form` says how it returns its loss."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(4, 1), form

    def forward(self, x, labels=None):
        y = self.linear(x)[:, 0]
        loss = None if labels is None else ((y - labels) ** 2).mean()
        if self.form == "tuple":
            return (loss, y)
        return {"loss": loss, "logits": y, "hidden_states": (y, y)}


POINTS = [{"x": [i / 9, 1.0, i % 2, 0.5], "labels": 2.0 * i} for i in range(9)]


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_a_plain_module_learns_and_predicts(tmp_path, form):
    run = trainer(tmp_path, Regression(form), POINTS, num_train_epochs=30, learning_rate=0.3)
    run.train()
    assert losses(run)[-1] < 0.3 * losses(run)[0]
    found = run.predict(POINTS)
    x = torch.tensor([row["x"] for row in POINTS])
    torch.testing.assert_close(torch.tensor(found.predictions), run.model.linear(x)[:, 0].detach())
    wanted = ((found.predictions - found.label_ids) ** 2).mean()
    assert found.metrics["test_loss"] == pytest.approx(wanted, rel=1e-5)
    bare = run.predict([{"x": row["x"]} for row in POINTS])
    assert bare.label_ids is None
    assert all("second" in name or "runtime" in name for name in bare.metrics)
    np.testing.assert_allclose(bare.predictions, found.predictions, rtol=1e-6)


def padded(rows, side, kind=DataCollatorWithPadding):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    return [dict(row, attention_mask=[1] * len(row["input_ids"])) for row in rows], kind(tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", ["classes", "tags", "answers"])
def test_packed_rows_give_what_padded_ones_do(tmp_path, side, task):
    auto = {"classes": AutoModelForSequenceClassification, "tags": AutoModelForTokenClassification,
            "answers": AutoModelForQuestionAnswering}[task]  # fmt: skip
    rows = texts(tags=task == "tags")
    if task == "answers":
        rows = [{"input_ids": r["input_ids"], "start_positions": 1,
                 "end_positions": len(r["input_ids"]) - 1} for r in rows]  # fmt: skip
    packed = trainer(tmp_path, bert(auto), rows, evals=rows, seed=3)
    packed.train()
    assert "lengths" in next(packed.batches(packed.eval_data[""])).inputs
    kind = DataCollatorForTokenClassification if task == "tags" else DataCollatorWithPadding
    rows, collator = padded(rows, "right", kind)
    loose = trainer(
        tmp_path, bert(auto), rows, evals=rows, seed=3, more={"data_collator": collator}
    )
    loose.train()
    assert losses(packed) == pytest.approx(losses(loose), rel=1e-5)
    # Rows that come padded are cut first.
    whole = tiny.tokenizer()
    whole.padding_side = side
    width, fat = 16, []
    for row in rows:
        pad = [0] * (width - len(row["input_ids"]))
        wide = {"input_ids": pad, "attention_mask": pad, "labels": [-100] * len(pad)}
        wide = {k: (v + row[k] if side == "left" else row[k] + v) if isinstance(row[k], list)
                else row[k] for k, v in wide.items() if k in row}  # fmt: skip
        wide |= {k: v for k, v in row.items() if k not in wide}
        if side == "left" and task == "answers":
            wide |= {k: row[k] + len(pad) for k in ("start_positions", "end_positions")}
        fat.append(wide)
    again = trainer(tmp_path, bert(auto), fat, seed=3)
    again.train()
    assert losses(again) == pytest.approx(losses(packed), rel=1e-6)


def test_metrics_choose_the_best_model_and_stop_early(tmp_path):
    class Worse(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step > 4:
                with torch.no_grad():
                    more["model"].classifier.weight.mul_(-1)

    run = trainer(
        tmp_path, rows=texts(12), evals=texts(9), num_train_epochs=12, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, metric_for_best_model="accuracy",
        load_best_model_at_end=True, save_total_limit=1,
        more={"compute_metrics": accuracy,
              "callbacks": [Worse(), EarlyStoppingCallback(early_stopping_patience=4)]},
    )  # fmt: skip
    assert run.args.greater_is_better
    run.train()
    found = [e["eval_accuracy"] for e in run.state.log_history if "eval_accuracy" in e]
    assert run.state.best_metric == max(found)
    assert len(found) < 36
    assert run.evaluate()["eval_accuracy"] == pytest.approx(max(found))
    assert (tmp_path / "log.jsonl").exists()


def test_several_sets_are_told_apart_and_keys_keep_one_prefix(tmp_path):
    def metrics(found):
        return {"eval_a_accuracy": accuracy(found)["accuracy"], "rows": np.int64(len(found[1]))}

    evals = {"a": texts(6), "b": texts(3)}
    run = trainer(tmp_path, evals=evals, more={"compute_metrics": metrics})
    found = run.evaluate()
    assert found["eval_a_rows"] == 6
    assert found["eval_b_rows"] == 3
    assert {"eval_a_accuracy", "eval_b_eval_a_accuracy", "eval_a_loss"} <= set(found)
    assert set(run.evaluate("b")) < set(found)
    with pytest.raises(ConfigError, match="no eval_dataset 'c'"):
        run.evaluate("c")


def test_a_loss_of_ones_own_by_function_or_by_method(tmp_path):
    def weighted(outputs, labels, num_items_in_batch):
        losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        return (losses * (1 + labels)).sum() / num_items_in_batch

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = weighted(outputs, inputs["labels"], num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    curves = []
    for micro, accumulation in ((4, 1), (1, 4)):
        cut = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        for kind, more in ((Trainer, {"compute_loss_func": weighted}), (Own, {})):
            run = trainer(tmp_path, kind=kind, more=more, **cut)
            run.train()
            curves.append(losses(run))
    plain = trainer(tmp_path)
    plain.train()
    assert all(curve == pytest.approx(curves[0], rel=1e-5) for curve in curves)
    assert abs(losses(plain)[0] - curves[0][0]) > 0.1


def test_a_given_optimizer_and_scheduler_are_used_and_resumed(tmp_path):
    def run(folder, **options):
        model = bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return trainer(folder, model, more={"optimizers": (optimizer, scheduler)}, **options)

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=3)
    whole.train()
    rates = [e["learning_rate"] for e in whole.state.log_history if "loss" in e]
    assert rates == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125])
    again = run(tmp_path / "a")
    again.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-3")
    assert losses(again) == losses(whole)


def test_logits_may_be_cut_down_before_they_are_kept(tmp_path):
    kept = []

    def metrics(found):
        kept.append(found.predictions)
        return {}

    cut = {"compute_metrics": metrics,
           "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}  # fmt: skip
    run = trainer(tmp_path, bert(AutoModelForTokenClassification), texts(tags=True),
                  evals=texts(5, tags=True), per_device_eval_batch_size=2, more=cut)  # fmt: skip
    run.evaluate()
    rows = texts(5, tags=True)
    assert kept[0].shape == (5, max(len(r["input_ids"]) for r in rows))
    for row, found in zip(rows, kept[0]):
        logits = run.model(torch.tensor([row["input_ids"]])).logits[0]
        size = len(row["input_ids"])
        assert found[:size].tolist() == logits.argmax(-1).tolist()


def test_an_adapter_and_its_head_are_trained_saved_and_loaded(tmp_path):
    model = get_peft_model(
        bert(), LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear")
    )
    run = trainer(tmp_path, model, num_train_epochs=15, more={"compute_metrics": accuracy})
    run.train()
    run.save_model()
    found = run.predict(texts())
    assert found.metrics["test_accuracy"] == 1
    again = Trainer(PeftModel.from_pretrained(bert(), tmp_path), run.args)
    np.testing.assert_allclose(again.predict(texts()).predictions, found.predictions, atol=1e-5)


def test_a_batch_without_labels_teaches_nothing_and_breaks_nothing(tmp_path):
    rows = texts(8, tags=True)
    for row in rows[:4]:
        row["labels"] = [-100] * len(row["labels"])
    run = trainer(tmp_path, bert(AutoModelForTokenClassification), rows, evals=rows, shuffle=False,
                  gradient_accumulation_steps=2, num_train_epochs=1, per_device_eval_batch_size=4,
                  more={"compute_metrics": lambda found: {}})  # fmt: skip
    run.train()
    half = trainer(tmp_path, bert(AutoModelForTokenClassification), rows[4:], evals=rows[4:],
                   shuffle=False, num_train_epochs=1)  # fmt: skip
    half.train()
    assert losses(run) == pytest.approx(losses(half), rel=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(half.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: trainer(f, rows=[{"input_ids": [5, 6]}]).train(), "gave no loss for the"),
        (lambda f: trainer(f, rows=iter(texts())), "needs a length"),
        (lambda f: trainer(f, Regression("tuple"), [{"y": 1.0}]).train(), "takes none of the col"),
        (lambda f: trainer(f, Regression("tuple"),
                           [{"x": [1.0], "labels": 1.0}, {"x": [1.0] * 4, "labels": 1.0}]).train(),
         "column 'x': its rows are not of one shape"),
        (lambda f: trainer(f, more={"optimizers": (None, object())}), "needs its optimizer"),
        (lambda f: trainer(f, more={"data_collator": lambda rows: rows}).train(), "not a mapping"),
        (lambda f: Trainer("bert-base-uncased"), "needs a model, not a str"),
        (lambda f: trainer(f).evaluate(), "no eval_dataset"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tmp_path, make, words):
    with pytest.raises((ConfigError, DataError), match=words):
        make(tmp_path)


def test_a_scheduler_that_waits_for_a_metric_is_refused(tmp_path):
    optimizer = torch.optim.SGD(bert().parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ConfigError, match="needs no metric"):
        trainer(tmp_path, more={"optimizers": (optimizer, plateau)})


def test_text_columns_stay_out_and_labels_are_called_so():
    rows = [{"x": [1, 2], "label": i, "text": "a", "nothing": None} for i in range(2)]
    batch = default_data_collator(rows)
    assert set(batch) == {"x", "labels"}
    assert batch["labels"].tolist() == [0, 1]


SCRIPT = """
import sys, json, torch
sys.path[:0] = [{tests!r}, {tests!r} + "/objectives"]
torch.set_num_threads(1)
import test_supervised as t
from topwork import AutoModelForTokenClassification
model = t.bert(AutoModelForTokenClassification)
run = t.trainer({out!r}, model, t.texts(11, tags=True), t.texts(7, tags=True),
                per_device_train_batch_size={micro}, per_device_eval_batch_size=2,
                more=dict(compute_metrics=lambda f: dict(
                    sum=float(f.predictions.clip(-9).sum()), rows=f.label_ids.tolist())))
run.train()
found = run.evaluate()
if run.world.is_main:
    open({out!r} + "/found.json", "w").write(json.dumps(found))
"""


def launch(out, micro, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = SCRIPT.format(tests=str(Path(__file__).parents[1]), out=str(out), micro=micro)
    env = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(rank)})
        for rank in range(world)
    ]
    assert [p.wait(timeout=120) for p in running] == [0] * world
    return json.loads((out / "found.json").read_text())


def test_two_processes_see_all_predictions_in_order(tmp_path):
    one, two = launch(tmp_path / "one", 4, 1), launch(tmp_path / "two", 2, 2)
    assert two["eval_rows"] == one["eval_rows"]
    assert two["eval_sum"] == pytest.approx(one["eval_sum"], rel=1e-4)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
