"""The one trainer: it owns the loop, the optimiser, precision, checkpoints, logs and callbacks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from topwork.errors import ConfigError, TrainingError
from topwork.ops.memory import keep_freed_memory
from topwork.training import checkpoint as checkpoints
from topwork.training import distributed, files, saving
from topwork.training.arguments import TrainingArguments
from topwork.training.callbacks import TrainerCallback, TrainerControl
from topwork.training.distributed import choose_device
from topwork.training.evaluation import Means, better
from topwork.training.interrupt import StopRequest
from topwork.training.objective import Objective, penalty, total_units
from topwork.training.optim import Optimiser, clip
from topwork.training.plan import Plan, main_dtype, plan_of, resident_memory
from topwork.training.precision import cast
from topwork.training.progress import Show
from topwork.training.report import facts_of, keep_until, write_report
from topwork.training.results import TrainOutput, check_overrides, speed, steps_of
from topwork.training.sampler import Sampler
from topwork.training.samples import SampleAnswers
from topwork.training.schedule import Given, Schedule, schedule
from topwork.training.state import TrainerState, begun
from topwork.training.surroundings import Surroundings
from topwork.training.trackers import trackers

LOG = "log.jsonl"


class Trainer(Surroundings):
    """Trains `model` towards `objective` on prepared samples.

    `train_data` and `eval_data` are sequences of the objective's samples; `eval_data` may be
    several by name. `notes` are lines about the data that the report before the run shows.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        train_data: Sequence[Any] = (),
        eval_data: Sequence[Any] | dict[str, Sequence[Any]] | None = None,
        *,
        tokenizer: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | tuple[Any, Any] | None = None,
        scheduler: LRScheduler | None = None,
        data_fingerprint: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        check_overrides(type(self))
        self.world = distributed.join()
        self.args, self.objective, self.tokenizer = args, objective, tokenizer
        self.train_data, self.notes = train_data, list(notes)
        named = eval_data if isinstance(eval_data, dict) else {"": eval_data or ()}
        self.eval_data = {name: data for name, data in named.items() if len(data)}
        self.train_dataset, self.eval_dataset = self.train_data, self.eval_data
        shown = SampleAnswers(objective, self.eval_data, tokenizer, args.sample_answers)
        self.device = choose_device(args.device, args.use_cpu)
        if args.bf16 is not None:
            cast(model, args.bf16)
        self.model = model.to(self.device)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        self.state = TrainerState(data=data_fingerprint)
        self.control = TrainerControl()
        own, scheduler = optimizer if isinstance(optimizer, tuple) else (optimizer, scheduler)
        self._given_optimizer: torch.optim.Optimizer | None = own
        self._given_schedule = None if scheduler is None else Given(scheduler)
        self.optimiser: Optimiser
        self.schedule: Schedule
        if args.eval_strategy != "no" and not self.eval_data:
            raise ConfigError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset")
        self._tokens, self._since = 0, 0.0
        self._add_callbacks([*callbacks, shown, *trackers(args, self.world.is_main)])

    # -- the run ---------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Run to the end; resume from the newest whole checkpoint (True) or a given one.

        Raises TrainingError, before the optimiser's step, for a loss or gradient that is no
        number. Ctrl-C and SIGTERM save a checkpoint, mid-accumulation if need be, and stop.
        """
        keep_freed_memory()
        self._prepare()
        folder = saving.chosen_checkpoint(self._home, resume_from_checkpoint)
        if folder is not None:
            saving.resume(self, folder)
        state, args = self.state, self.args
        with Show(state.max_steps, state.global_step, self._quiet) as self.show, \
                StopRequest() as stop:  # fmt: skip
            if self.world.is_main:
                planned = [*self.plan().lines(), *self._steps_lines()]
                self._facts = facts_of(self, planned)
                self.show.lines([*self.notes, *planned])
            self._write_log()
            self._fire("on_train_begin")
            if args.eval_on_start and state.global_step == 0:
                self.evaluate()
            self._since, self._tokens = time.perf_counter(), 0
            self._began = (self._since, state.global_step)
            while state.global_step < state.max_steps and not self.control.should_training_stop:
                if state.global_step % self.sampler.steps_per_epoch == 0 and not state.micro_step:
                    self._fire("on_epoch_begin")
                self._step(stop)
                self._after_step()
                if stop.signal is not None:
                    self._stop(stop)
            self._finish()
        last = state.log_history[-1]
        metrics = {k: v for k, v in last.items() if k != "step"}
        return TrainOutput(state.global_step, last["train_loss"], metrics)

    def _prepare(self) -> None:
        args = self.args
        if not len(self.train_data):
            raise ConfigError("there is no training data")
        made = self.create_optimizer()
        if not hasattr(self, "optimiser") or made is not self.optimiser.inner:  # by a subclass
            self.optimiser = Optimiser(self.model, args, made)
        if not self.optimiser.named:
            raise ConfigError("no parameter of the model is trainable: add an adapter")
        self.sampler = Sampler(
            len(self.train_data), self._samples(args.per_device_train_batch_size),
            args.gradient_accumulation_steps,
            args.seed if args.data_seed is None else args.data_seed,
            args.shuffle and not hasattr(self.train_data, "known"), self.world.rank,
            self.world.size, getattr(self.objective, "repeat", 1),
        )  # fmt: skip
        steps = args.max_steps
        if steps <= 0:
            steps = math.ceil(args.num_train_epochs * self.sampler.steps_per_epoch)
        self.state = begun(self.state.data, steps, self.sampler.steps_per_epoch, args, self.world)
        self.control = TrainerControl()
        self.schedule = self._given_schedule or schedule(
            args.lr_scheduler_type, steps, args.warmup(steps), **args.lr_scheduler_kwargs
        )
        torch.manual_seed(args.seed + self.world.rank)
        self.model.train(not args.disable_dropout)

    def _step(self, stop: StopRequest) -> None:
        """One optimiser step over all its micro-batches."""
        state, args = self.state, self.args
        self._fire("on_step_begin")
        groups = self.sampler.groups(state.global_step)
        batches = self._assembled(groups)
        units = self.world.total(*total_units([self.objective.weight(b) for b in batches]))
        if not any(units):
            raise TrainingError(
                f"step {state.global_step}: its rows {self._rows(batches)} have nothing to train"
            )
        for batch in batches[state.micro_step :]:
            self._micro_step(batch, units)
            self._fire("on_substep_end")
            if stop.signal is not None and not getattr(self.objective, "draws", False):
                self._stop(stop)
        tensors = self.optimiser.parameters
        self.world.add_gradients(tensors)
        norm = clip(tensors, args.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {state.global_step}: the gradient's norm is {norm}; its rows are "
                f"{self._rows(batches)}. No step was taken"
            )
        self._fire("on_pre_optimizer_step")
        rate = self.optimiser.set_factor(self.schedule(state.global_step))
        self.optimiser.step()
        self._fire("on_optimizer_step")
        self.optimiser.zero_grad()
        state.global_step += 1
        state.micro_step = 0
        state.epoch = state.global_step / self.sampler.steps_per_epoch
        pending = state.pending
        pending["steps"] = pending.get("steps", 0) + 1
        pending["grad_norm"], pending["learning_rate"] = norm, rate

    def _assembled(self, groups: Sequence[Sequence[int]]) -> list[Any]:
        """The micro-batches of a step; when they cannot be made the run so far is saved first."""
        samples = [[self.train_data[i] for i in group] for group in groups]
        try:
            return self.objective.assemble(self.model, samples, self.world)
        except TrainingError as error:
            folder = self.save_checkpoint()
            raise TrainingError(f"{error}. The run so far is saved as {folder}") from error

    def _stop(self, stop: StopRequest) -> None:
        folder = self.save_checkpoint()
        self.show.lines([f"stopped; resume from {folder}"])
        stop.end(f"saved as {folder}")

    def _micro_step(self, batch: Any, units: Sequence[float]) -> None:
        """Forward and backward of one micro-batch, its loss a share of the whole step's."""
        loss = self.objective.loss(self.model, batch)
        part = loss.over(units) + penalty(self.model, self.objective, batch, units)
        value = float(part.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"step {self.state.global_step}: the loss is {value} on the rows "
                f"{list(self.objective.rows(batch))}. No step was taken; the last checkpoint is "
                "untouched"
            )
        part.backward()
        state = self.state
        state.micro_step += 1
        tokens = self.objective.tokens(batch)
        state.num_input_tokens_seen += tokens
        self._tokens += tokens
        state.pending["loss"] = state.pending.get("loss", 0.0) + value
        for name, (total, count) in loss.metrics.items():
            old = state.pending.get(f"m/{name}", [0.0, 0.0])
            state.pending[f"m/{name}"] = [old[0] + total, old[1] + count]

    def _after_step(self) -> None:
        state, args, control = self.state, self.args, self.control
        step, last = state.global_step, state.global_step == state.max_steps
        epoch_over = step % self.sampler.steps_per_epoch == 0
        rate = self._tokens / max(1e-9, time.perf_counter() - self._since)
        mean = state.pending["loss"] / max(1, state.pending["steps"])
        self.show.step(step, mean, rate)
        self._fire("on_step_end")
        if epoch_over:
            self._fire("on_epoch_end")
        first = args.logging_first_step and step == 1
        due = _due(args.logging_strategy, args.logging_steps, step, epoch_over)
        if control.should_log or first or last or due:
            self._log_training()
        if control.should_evaluate or _due(args.eval_strategy, args.eval_steps, step, epoch_over):
            self.evaluate()
        if control.should_save or _due(args.save_strategy, args.save_steps, step, epoch_over):
            self.save_checkpoint()
        control.should_log = control.should_evaluate = control.should_save = False

    def _finish(self) -> None:
        args, state = self.args, self.state
        newest = checkpoints.checkpoints(self._home)
        if args.save_strategy in ("steps", "epoch") and (
            not newest or newest[-1][0] != state.global_step
        ):
            self.save_checkpoint()
        else:
            self._report()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            checkpoints.verify(Path(state.best_model_checkpoint))
            files.load_trained(self.model, Path(state.best_model_checkpoint))
        self.model.eval()
        self.log({**self._summary(), "train_loss": self._mean_loss()})
        self._fire("on_train_end")

    def _summary(self) -> dict[str, float]:
        """How fast the run went, since it began or was resumed."""
        start, first = self._began
        steps = self.state.global_step - first
        samples = steps * self.args.train_batch_size * self.args.gradient_accumulation_steps
        found = speed(time.perf_counter() - start, samples * self.world.size, steps)
        return {f"train_{name}": value for name, value in found.items()}

    def _mean_loss(self) -> float:
        """Over all steps, those before a resumption among them."""
        (rest,) = self.world.total(self.state.pending.get("loss", 0.0))
        return (self.state.loss_sum + rest) / max(1, self.state.global_step)

    # -- evaluation ------------------------------------------------------------------------------

    def evaluate(
        self, eval_data: Sequence[Any] | dict[str, Sequence[Any]] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:  # fmt: skip
        """Mean loss and metrics over the evaluation samples, logged under `eval_…`."""
        given = eval_data if isinstance(eval_data, dict) else {"": eval_data}
        chosen = self.eval_data if eval_data is None else given
        if not chosen:
            raise ConfigError("there is no eval_dataset")
        paused = started = time.perf_counter()
        found: dict[str, float] = {}
        with self.judging():
            for name, data in chosen.items():
                prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
                means = self.measure(data or ())
                size = self.args.eval_batch_size * self.world.size
                count = len(data or ())
                means |= speed(time.perf_counter() - started, count, steps_of(count, size))
                started = time.perf_counter()
                found |= {prefix + k.removeprefix(prefix): v for k, v in means.items()}
        self.log(found)
        self._note_best(found)
        self._fire("on_evaluate", metrics=found)
        self._since += time.perf_counter() - paused
        return found

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Within it the model does not learn."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def measure(self, data: Sequence[Any]) -> dict[str, float]:
        """The mean loss and metrics over `data`."""
        means = Means()
        for batch in self.batches(data):
            means.add(self.objective.loss(self.model, batch), self.objective.weight(batch))
        return means.over(self.world)

    def batches(self, data: Sequence[Any]) -> Iterator[Any]:
        """This process's batches of `data`, in order, for evaluation."""
        size = self._samples(self.args.per_device_eval_batch_size)
        mine = range(self.world.rank, len(data), self.world.size)
        for at in range(0, len(mine), size):
            group = [data[i] for i in mine[at : at + size]]
            yield from self.objective.assemble(self.model, [group])
            self._fire("on_prediction_step")

    def _note_best(self, metrics: dict[str, float]) -> None:
        state, args = self.state, self.args
        found = better(metrics, state.best_metric, args)
        if found is None:
            return
        state.best_metric = found
        wanted = args.load_best_model_at_end or args.save_strategy == "best"
        if wanted and hasattr(self, "optimiser"):
            state.best_model_checkpoint = str(self._home / f"checkpoint-{state.global_step}")
            self.control.should_save = True

    # -- logs ------------------------------------------------------------------------------------

    def _log_training(self) -> None:
        state, pending = self.state, self.state.pending
        if not pending.get("steps"):
            return
        names = sorted(n for n in pending if n.startswith("m/"))
        flat = self.world.total(pending["loss"], *(v for n in names for v in pending[n]))
        seconds = time.perf_counter() - self._since
        entry = {
            "loss": flat[0] / pending["steps"],
            "grad_norm": pending["grad_norm"],
            "learning_rate": pending["learning_rate"],
            **{
                n.removeprefix("m/"): flat[1 + 2 * i] / max(flat[2 + 2 * i], 1e-12)
                for i, n in enumerate(names)
            },
            "num_tokens": state.num_input_tokens_seen,
            "tokens_per_second": round(self._tokens / max(seconds, 1e-9), 1),
            "memory": resident_memory(),
        }
        state.loss_sum += flat[0]
        state.pending = {}
        self._tokens, self._since = 0, time.perf_counter()
        self.log(entry)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Put `logs` into the run's history and its log, show and report them."""
        state = self.state
        whole = {**logs, "epoch": round(state.epoch, 6), "step": state.global_step}
        state.log_history.append(whole)
        if self.world.is_main and hasattr(self, "show"):
            self.show.log({k: v for k, v in whole.items() if k != "memory"})
            with (self._home / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
        self._fire("on_log", logs=whole)

    def _write_log(self) -> None:
        """The logs say what the state says, also after resuming from an earlier point."""
        if self.world.is_main:
            self._home.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(entry) + "\n" for entry in self.state.log_history)
            (self._home / LOG).write_text(text, encoding="utf-8")
            keep_until(self.state.global_step, self._home)

    def _report(self) -> None:
        if self._facts is not None and self.state.log_history:
            write_report(self._home, self.state.log_history, self._facts)

    @property
    def _quiet(self) -> bool:
        return self.args.disable_tqdm or not self.world.is_main

    def _steps_lines(self) -> list[str]:
        args, sampler, state = self.args, self.sampler, self.state
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        devices = f" on each of {self.world.size} devices" if self.world.size > 1 else ""
        done = f", {state.global_step} done" if state.global_step else ""
        return [
            f"{state.max_steps} steps of {batch} samples{devices}, {sampler.steps_per_epoch} an "
            f"epoch{done}; {self.device}, {main_dtype(self.model)}"
        ]

    def plan(self) -> Plan:
        """What the run will need, from a trial on a sample of middling size."""
        trained = sum(p.numel() for p in self.optimiser.parameters)
        per = 16 if self.optimiser.masters else 12  # gradient and two moments, in fp32
        micro = self._samples(self.args.per_device_train_batch_size)
        return plan_of(
            self.model, self.objective, self.train_data, micro, per * trained, self.device
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """A whole, verified checkpoint of this moment, gradients of an open step included."""
        state = self.state
        folder = self._home / f"checkpoint-{state.global_step}"
        if self.world.is_main:
            folder = checkpoints.write_checkpoint(
                self._home, state.global_step, partial(saving.write, self)
            )
            if self.args.save_total_limit is not None:
                best = state.best_model_checkpoint
                checkpoints.prune(
                    self._home, self.args.save_total_limit, None if best is None else Path(best)
                )
            self._report()
        self.world.wait()
        self._fire("on_save")
        return folder

    # -- small things ----------------------------------------------------------------------------

    def create_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the run; a subclass may make another and return it."""
        self.optimiser = Optimiser(self.model, self.args, self._given_optimizer)
        self.optimizer = self.optimiser.inner
        return self.optimizer

    def _samples(self, items: int) -> int:
        """Samples that make up a batch size."""
        return max(1, items // getattr(self.objective, "answers", 1))

    def _rows(self, batches: Sequence[Any]) -> list[int]:
        return [row for batch in batches for row in self.objective.rows(batch)]


def _due(strategy: str, every: int | None, step: int, epoch_over: bool) -> bool:
    if strategy == "epoch":
        return epoch_over
    return strategy == "steps" and every is not None and step % every == 0
