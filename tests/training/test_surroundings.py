"""What scripts ask of a trainer beside training: callbacks, numbers, files, processes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from topwork import Trainer, TrainerCallback, TrainingArguments, training
from topwork.errors import ConfigError

ROWS = [{"x": [float(i), 1.0], "labels": float(i % 3)} for i in range(8)]
ARGS = {
    "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.05, "use_cpu": True,
}  # fmt: skip


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x)[:, 0] - labels).square().mean()}


def trainer(home, cls=Trainer, callbacks=None, **changes):
    args = TrainingArguments(str(home), **{**ARGS, "disable_tqdm": True, **changes})
    return cls(Line(), args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)


class Noted(TrainerCallback):
    """Notes which events there were, and with what."""

    def __init__(self):
        self.seen = {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **more: self.seen.setdefault(name, []).append(more)


def test_train_returns_and_logs_the_mean_loss_and_the_speed(tmp_path):
    run = trainer(tmp_path)
    steps, loss, metrics = run.train()
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert steps == 4
    assert loss == metrics["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    last = run.state.log_history[-1]
    assert metrics == {k: v for k, v in last.items() if k != "step"}
    ratio = last["train_samples_per_second"] / last["train_steps_per_second"]
    assert ratio == pytest.approx(4, rel=0.01)
    assert last["train_runtime"] > 0


def test_the_mean_loss_of_a_run_that_is_cut_short_is_over_its_own_steps(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            control.should_training_stop = state.global_step == 3

    whole, cut = trainer(tmp_path), trainer(tmp_path, callbacks=[Stop], logging_strategy="epoch")
    whole.train()
    losses = [e["loss"] for e in whole.state.log_history if "loss" in e]
    assert cut.train().training_loss == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)


def test_evaluation_tells_its_speed(tmp_path):
    found = trainer(tmp_path).evaluate()
    ratio = found["eval_samples_per_second"] / found["eval_steps_per_second"]
    assert ratio == pytest.approx(8, rel=0.01)


def test_logs_may_be_by_epoch_or_at_the_end_alone(tmp_path):
    for strategy, steps in (("epoch", [2, 4]), ("no", [4])):
        run = trainer(tmp_path, logging_strategy=strategy)
        run.train()
        assert [e["step"] for e in run.state.log_history if "loss" in e] == steps


def test_only_the_best_is_saved_if_that_is_asked_for(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="best")
    run.train()
    evals = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    best = [i + 1 for i, e in enumerate(evals) if e < min([*evals[:i], float("inf")])]
    saved = sorted(int(p.name.removeprefix("checkpoint-")) for p in tmp_path.glob("checkpoint-*"))
    assert saved == best
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best[-1]}")


def test_every_event_is_told_with_model_and_optimizer(tmp_path):
    noted = Noted()
    run = trainer(tmp_path, callbacks=[noted], save_strategy="epoch", eval_strategy="epoch")
    run.train()
    run.predict(ROWS)
    counts = {name: len(calls) for name, calls in noted.seen.items()}
    assert counts == {
        "on_init_end": 1, "on_train_begin": 1, "on_epoch_begin": 2, "on_step_begin": 4,
        "on_substep_end": 8, "on_pre_optimizer_step": 4, "on_optimizer_step": 4, "on_step_end": 4,
        "on_epoch_end": 2, "on_prediction_step": 3, "on_evaluate": 2, "on_log": 7, "on_save": 2,
        "on_predict": 1, "on_train_end": 1,
    }  # fmt: skip
    (begun,) = noted.seen["on_train_begin"]
    assert begun["model"] is run.model
    assert begun["optimizer"] is run.optimizer
    assert "test_loss" in noted.seen["on_predict"][0]["metrics"]


def test_callbacks_come_and_go_as_objects_and_as_classes(tmp_path):
    class Mine(TrainerCallback): ...

    run, one = trainer(tmp_path, callbacks=[Mine]), Mine()
    run.add_callback(one)
    run.add_callback(Mine)
    assert sum(isinstance(c, Mine) for c in run.callbacks) == 3
    run.remove_callback(one)
    assert sum(isinstance(c, Mine) for c in run.callbacks) == 2
    run.remove_callback(Mine)
    assert not any(isinstance(c, Mine) for c in run.callbacks)


def test_the_state_tells_of_the_run_and_is_written(tmp_path):
    run = trainer(tmp_path)
    run.train()
    state = run.state
    assert (state.num_train_epochs, state.train_batch_size, state.logging_steps) == (2, 2, 1)
    assert state.is_world_process_zero
    assert run.is_world_process_zero()
    run.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4


def test_metrics_are_shown_and_written(tmp_path, capsys):
    run = trainer(tmp_path)
    metrics = run.train().metrics
    run.log_metrics("train", metrics)
    assert "train_loss" in capsys.readouterr().err
    run.save_metrics("train", metrics)
    run.save_metrics("eval", {"eval_loss": 1.0})
    assert json.loads((tmp_path / "train_results.json").read_text()) == metrics
    both = json.loads((tmp_path / "all_results.json").read_text())
    assert both == {**metrics, "eval_loss": 1.0}


def test_a_subclass_may_log_more_and_make_its_optimizer(tmp_path):
    class Mine(Trainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "twice": 2 * logs["loss"]} if "loss" in logs else logs)

        def create_optimizer(self):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
            return self.optimizer

    run = trainer(tmp_path, Mine)
    run.train()
    assert run.state.log_history[0]["twice"] == 2 * run.state.log_history[0]["loss"]
    assert type(run.optimizer) is torch.optim.SGD
    assert run.optimiser.inner is run.optimizer


@pytest.mark.parametrize("name", ["training_step", "get_train_dataloader", "create_scheduler"])
def test_a_method_that_would_never_be_called_is_refused(tmp_path, name):
    mine = type("Mine", (Trainer,), {name: lambda self: None})
    with pytest.raises(ConfigError, match=rf"Mine\.{name} would never be called"):
        trainer(tmp_path, mine)


def test_a_subclass_may_compute_the_loss_where_that_is_asked_for(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            outputs = model(**inputs)
            loss = 3 * outputs["loss"]
            return (loss, outputs) if return_outputs else loss

    plain, mine = trainer(tmp_path), trainer(tmp_path, Mine)
    assert mine.evaluate()["eval_loss"] == pytest.approx(3 * plain.evaluate()["eval_loss"])


def test_batches_can_be_looked_at(tmp_path):
    run = trainer(tmp_path)
    batch = next(iter(run.get_train_dataloader()))
    assert batch["x"].tolist() == [row["x"] for row in ROWS[:2]]
    assert len(run.get_eval_dataloader()) == 1
    assert len(run.get_test_dataloader(ROWS[:1])) == 1


def test_the_model_may_come_from_a_function(tmp_path):
    run = Trainer(args=TrainingArguments(str(tmp_path)), train_dataset=ROWS, model_init=Line)
    assert isinstance(run.model, Line)
    with pytest.raises(ConfigError, match="Trainer needs a model"):
        Trainer(args=TrainingArguments(str(tmp_path)), train_dataset=ROWS)


def test_scripts_speak_for_all_processes(tmp_path, capsys):
    run = trainer(tmp_path)
    run.accelerator.print("done", 1)
    assert capsys.readouterr().out == "done 1\n"
    assert run.accelerator.is_main_process
    assert run.accelerator.unwrap_model(run.model) is run.model


def test_the_last_whole_checkpoint_is_found(tmp_path):
    assert training.get_last_checkpoint(tmp_path) is None
    trainer(tmp_path, save_strategy="epoch").train()
    assert training.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
)
def test_schedulers_for_loops_of_ones_own_are_the_peers(name):
    rates = []
    for library in (training, transformers):
        optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
        found = library.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
        seen = []
        for _ in range(10):
            optimizer.step()
            seen.append(found.get_last_lr()[0])
            found.step()
        rates.append(seen)
    assert rates[0] == pytest.approx(rates[1], abs=1e-6)


def test_a_seed_starts_every_generator():
    draws = []
    for _ in range(2):
        training.set_seed(5)
        draws.append((torch.rand(1).item(), __import__("random").random()))
    assert draws[0] == draws[1]
    with pytest.raises(ConfigError, match="nearest: 'cosine'"):
        training.get_scheduler("cosin", None)
