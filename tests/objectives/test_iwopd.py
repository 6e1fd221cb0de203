"""IW-OPD: its weights against a formula, its loss against TRL's, and runs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import tiny
from topwork import IWOPDConfig, IWOPDTrainer, LoraConfig, TrainerCallback
from topwork.errors import ConfigError
from topwork.objectives.iwopd import early_weights
from topwork.objectives.policy import Spread

ROWS = tiny.chats(6)
OPTIONS = {
    "per_device_train_batch_size": 6, "learning_rate": 2e-2, "max_steps": 1, "logging_steps": 1,
    "disable_tqdm": True, "save_strategy": "no", "shuffle": False, "max_new_tokens": 6,
}  # fmt: skip


def trainer(folder, rows=ROWS, callbacks=(), lora=True, **options):
    torch.manual_seed(2)
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    return IWOPDTrainer(
        tiny.model(0), tiny.model(1), IWOPDConfig(output_dir=str(folder), **{**OPTIONS, **options}),
        rows, rows, processing_class=tiny.tokenizer(), callbacks=callbacks,
        peft_config=adapter if lora else None,
    )  # fmt: skip


def logged(run, name):
    return [e[name] for e in run.state.log_history if name in e]


def test_a_token_counts_by_what_lies_before_it():
    gains = torch.tensor([1.0, -3.0, 0.5, -2.0, 2.0, 0.0, 0.0])
    owners = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    found = early_weights(gains, Spread(owners, 3), 0.6)
    wanted = [1.6, 1 + 0.6 * 3.5 / 4.5, 1 + 0.6 * 0.5 / 4.5, 1.6, 1.3, 1.6, 1.6]
    torch.testing.assert_close(found, torch.tensor(wanted))
    empty = early_weights(gains[:0], Spread(owners[:0], 0), 0.6)
    assert empty.shape == (0,)
    gap = early_weights(gains[:2], Spread(torch.tensor([1, 1]), 3), 0.6)  # answers of no token
    torch.testing.assert_close(gap, torch.tensor([1.6, 1.45]))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.7, "iw_opd_gamma": 2.0}], ids=str)
def test_the_loss_and_its_gradients_equal_the_peers(tmp_path, options, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl.experimental.iw_opd import IWOPDTrainer as Peer

    run = trainer(tmp_path, lora=False, **options)
    (batch,) = run.objective.assemble(run.model, [run.train_data])  # the rows as they are
    ours = run.objective.loss(run.model, batch)
    mine = ours.total / run.objective.weight(batch)

    width = max(len(s.ids) for s in run.train_data)
    ids = torch.zeros(len(run.train_data), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, s in enumerate(run.train_data):
        own = torch.tensor(s.ids).long()
        ids[i, : len(own)], mask[i, : len(own)] = own, 1
        labels[i, : len(own)] = own.masked_fill(~torch.tensor(s.trained), -100)
    self = SimpleNamespace(
        temperature=options.get("temperature", 1.0), iw_opd_epsilon=1e-8,
        iw_opd_gamma=options.get("iw_opd_gamma", 0.5), model=run.model,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    with torch.no_grad():
        said = run.objective.teacher.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        said = (said / self.temperature).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    logits = run.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    theirs = Peer._compute_iw_opd_loss(self, logits, ids[:, 1:], labels[:, 1:], said)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    tensors = list(run.model.parameters())
    slopes = [torch.autograd.grad(x, tensors, retain_graph=True) for x in (mine, theirs)]
    for one, other in zip(*slopes):
        assert (one - other).norm() < 1e-4 * other.norm() + 1e-7
    told, count = ours.metrics["iw_opd/mean_weight"]
    peers = self._metrics["train" if run.model.training else "eval"]["iw_opd/mean_weight"]
    assert told / count == pytest.approx(peers[0], rel=1e-5)


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def test_the_cut_of_a_step_changes_no_gradient(tmp_path):
    whole, parts = Note(), Note()
    one = trainer(tmp_path, callbacks=[whole], max_grad_norm=0)
    two = trainer(tmp_path, callbacks=[parts], max_grad_norm=0, per_device_train_batch_size=2,
                  gradient_accumulation_steps=3)  # fmt: skip
    for run in (one, two):
        run.train()
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-4)
    for mine, other in zip(whole.grads[0], parts.grads[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-7)


def test_the_student_comes_nearer_to_the_teacher_on_its_own_answers(tmp_path):
    run = trainer(tmp_path, lora=False, max_steps=30, lr_scheduler_type="constant",
                  max_new_tokens=12, learning_rate=1e-2)  # fmt: skip
    run.train()
    apart = logged(run, "divergence")
    assert sum(apart[-5:]) < 0.6 * sum(apart[:5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.5}, "take GKDTrainer"),
        ({"sft_weight": 0.1}, "its own words"),
        ({"iw_opd_gamma": -1}, "iw_opd_gamma=-1"),
        ({"distillation_objective": "jsd"}, "GKDTrainer's"),
    ],
)
def test_what_cannot_be_meant_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        IWOPDConfig(**options)
