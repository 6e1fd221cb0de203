"""`report_to`: a run's figures reach the trackers under the names that dashboards know."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

import tiny
from topwork import LoraConfig, SFTConfig, SFTTrainer
from topwork.errors import ConfigError
from topwork.training.trackers import figures


def trained(folder, report_to):
    args = SFTConfig(
        output_dir=str(folder), max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4,
        report_to=report_to, run_name="first", disable_tqdm=True, save_strategy="no",
        sample_answers=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny.model(), args, train_dataset=tiny.chats(8), eval_dataset=tiny.chats(2),
        processing_class=tiny.tokenizer(), peft_config=LoraConfig(target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.train()
    return [e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e]


def test_names_are_those_of_the_dashboards():
    logs = {"loss": 2.0, "eval_loss": 1.0, "evaluated": 3, "note": "x", "epoch": 0.5, "step": 7}
    assert figures(logs) == {
        "train/loss": 2.0, "eval/loss": 1.0, "train/evaluated": 3.0, "train/epoch": 0.5,
    }  # fmt: skip


def test_tensorboard_reads_the_losses_that_were_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = trained(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "runs" / "first"))
    events.Reload()
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        seen = [(e.step, e.value) for e in events.Scalars(tag)]
        assert seen == [(e["step"], pytest.approx(e[name])) for e in logged if name in e]
    assert len(events.Scalars("train/learning_rate")) == 2


class Run:
    """A tracker's run: keeps what it is told."""

    def __init__(self):
        self.told, self.ended = [], False

    def finish(self):
        self.ended = True


def installed(monkeypatch, name, **parts):
    module = ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("open_before", [False, True])
def test_wandb_gets_each_log_and_only_its_own_run_is_finished(tmp_path, monkeypatch, open_before):
    run = Run()
    wandb = installed(
        monkeypatch, "wandb", run=run if open_before else None,
        config=SimpleNamespace(update=lambda *a, **k: None), define_metric=lambda *a, **k: None,
        log=run.told.append,
    )  # fmt: skip

    def init(**given):
        run.given, wandb.run = given, run
        return run

    wandb.init = init
    monkeypatch.setenv("WANDB_PROJECT", "grafts")
    logged = trained(tmp_path, ["wandb"])
    assert [t["train/global_step"] for t in run.told if "train/loss" in t] == [2, 4]
    assert run.told[0]["train/loss"] == logged[0]["loss"]
    assert run.ended != open_before
    if not open_before:
        assert (run.given["project"], run.given["name"]) == ("grafts", "first")


def test_mlflow_gets_parameters_and_figures(tmp_path, monkeypatch):
    told, state = [], SimpleNamespace(run=None)
    installed(
        monkeypatch, "mlflow", active_run=lambda: state.run,
        start_run=lambda run_name: setattr(state, "run", run_name),
        end_run=lambda: setattr(state, "run", None),
        log_params=lambda values: told.append(values),
        log_metrics=lambda values, step: told.append((step, values)),
    )  # fmt: skip
    trained(tmp_path, "mlflow")
    assert told[0]["max_steps"] == "4"
    assert {step for step, _ in told[1:]} == {2, 4}
    assert state.run is None


def test_what_is_unknown_or_not_installed_is_refused_before_the_run(monkeypatch):
    with pytest.raises(ConfigError, match="nearest: 'tensorboard'"):
        SFTConfig(report_to="tensorbord")
    monkeypatch.setattr("topwork.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        SFTConfig(report_to=["wandb"])
    assert SFTConfig(report_to="all").trackers() == ()
    assert SFTConfig(report_to=None).trackers() == ()
