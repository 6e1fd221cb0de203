"""A teacher behind a server: what is asked of it, the losses against TRL's, and runs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import tiny
from serving import process
from teaching import teaching
from topwork import (
    LoraConfig,
    ServerDistillationConfig,
    ServerDistillationTrainer,
    TrainerCallback,
)
from topwork.errors import ConfigError, TrainingError
from topwork.ops import sparse_divergence
from topwork.training.distributed import World

ROWS = tiny.chats(6)
OPTIONS = {
    "per_device_train_batch_size": 6, "learning_rate": 1e-2, "max_steps": 1, "logging_steps": 1,
    "disable_tqdm": True, "save_strategy": "no", "shuffle": False, "max_new_tokens": 6,
}  # fmt: skip


@pytest.fixture
def teacher():
    with teaching(tiny.model(1)) as server:
        yield server


def trainer(folder, server, rows=ROWS, callbacks=(), lora=True, model=None, **options):
    torch.manual_seed(2)
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    args = ServerDistillationConfig(
        output_dir=str(folder), teacher_model_server_url=server and server.url,
        **{**OPTIONS, **options},
    )  # fmt: skip
    return ServerDistillationTrainer(
        model or tiny.model(0), args=args, train_dataset=rows, eval_dataset=rows,
        processing_class=tiny.tokenizer(), peft_config=adapter if lora else None,
        callbacks=callbacks,
    )  # fmt: skip


def logged(run, name):
    return [e[name] for e in run.state.log_history if name in e]


def test_the_teacher_reads_each_text_once_and_says_what_it_would_say_here(tmp_path, teacher):
    run = trainer(tmp_path, teacher, loss_top_k=3)
    (one,) = run.objective.assemble(run.model, [run.train_data[:2]])
    assert [path for path, _ in teacher.calls] == ["/v1/completions"] * 2
    asked = {tuple(body.pop("prompt")) for _, body in teacher.calls}
    assert asked == {tuple(s.ids.tolist()) for s in run.train_data[:2]}
    assert teacher.calls[0][1] == {
        "model": "teacher", "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 3,
    }  # fmt: skip
    at = 0
    for size in one.batch.lengths:
        ids = one.batch.input_ids[:, at : at + size]
        own = (one.batch.positions >= at) & (one.batch.positions < at + size)
        with torch.no_grad():
            wanted = tiny.model(1)(ids).logits[0].log_softmax(-1)
        wanted = wanted[one.batch.positions[own] - at]
        best = wanted.topk(3)
        torch.testing.assert_close(one.likeliest[own], best.values)
        assert torch.equal(one.ids[own], best.indices)
        written = wanted.gather(1, one.batch.targets[own, None])[:, 0]
        torch.testing.assert_close(one.written[own], written)
        at += size


# -- the losses ------------------------------------------------------------------------------------

CASES = [
    {"beta": 1.0}, {"beta": 0.0, "loss_top_k": 1}, {"beta": 0.0, "loss_top_k": 5},
    {"beta": 0.0, "loss_top_k": 5, "loss_add_tail": False}, {"beta": 0.4},
    {"beta": 0.4, "loss_add_tail": False},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_equal_the_peers(tmp_path, teacher, monkeypatch, case):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl.experimental.server_distillation import ServerDistillationTrainer as Peer

    run = trainer(tmp_path, teacher, lora=False, **case)
    (batch,) = run.objective.assemble(run.model, [run.train_data])
    batch.ids[:3, 0], batch.likeliest[:3, 0] = batch.batch.targets[:3], batch.written[:3]
    ours = run.objective.loss(run.model, batch).total / run.objective.weight(batch)

    peer = Peer.__new__(Peer)
    peer.beta, peer.loss_add_tail = case["beta"], case.get("loss_add_tail", True)
    peer.reverse_kl_top_1_mode = "sampled"
    hidden = run.model.backbone(batch.batch.input_ids, lengths=batch.batch.lengths)
    logits = run.model.head(hidden[0, batch.batch.positions])[None].log_softmax(-1)
    labels = batch.batch.targets[None]
    told = {"actual_logprobs": batch.written[None], "topk_logprobs": batch.likeliest[None],
            "topk_token_ids": batch.ids[None]}  # fmt: skip
    if case["beta"] == 0:
        theirs = peer._compute_server_forward_kl_loss(told, logits, labels)
    else:
        theirs = peer._compute_server_sparse_top_1_divergence_loss(told, logits, labels, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    tensors = list(run.model.parameters())
    slopes = [torch.autograd.grad(x, tensors, retain_graph=True) for x in (ours, theirs)]
    for one, other in zip(*slopes):
        assert (one - other).norm() < 1e-4 * other.norm() + 1e-7


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_what_is_known_of_the_teacher_is_compared_and_nothing_else(beta, rest):
    torch.manual_seed(0)
    head, student = torch.nn.Linear(8, 31, bias=False), torch.randn(300, 8, requires_grad=True)
    ids = torch.stack([torch.randperm(31)[:4] for _ in range(300)])
    said = torch.randn(300, 31).log_softmax(1).gather(1, ids)
    said[:100, 3] = -math.inf
    found = sparse_divergence(head, student, ids, said, beta, rest)
    whole = head(student).log_softmax(1)
    for row in (0, 99, 100, 299):
        count = 3 if row < 100 else 4
        p, q = whole[row, ids[row, :count]].exp(), said[row, :count].exp()
        if rest:
            p, q = (torch.cat([x, 1 - x.sum()[None]]) for x in (p, q))
        else:
            p, q = p / p.sum(), q / q.sum()
        mixed = (1 - beta) * p + beta * q
        wanted = beta * (q * (q / mixed).log()).sum() + (1 - beta) * (p * (p / mixed).log()).sum()
        if beta in (0, 1):
            wanted = ((q * (q / p).log()) if beta == 0 else (p * (p / q).log())).sum()
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    assert student.grad.isfinite().all()


# -- runs ------------------------------------------------------------------------------------------


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def test_the_cut_of_a_step_changes_no_gradient(tmp_path, teacher):
    """The peer takes the mean of each micro-batch's tokens."""
    whole, parts = Note(), Note()
    one = trainer(tmp_path, teacher, callbacks=[whole], max_grad_norm=0, sft_weight=0.1)
    two = trainer(tmp_path, teacher, callbacks=[parts], max_grad_norm=0, sft_weight=0.1,
                  per_device_train_batch_size=2, gradient_accumulation_steps=3)  # fmt: skip
    for run in (one, two):
        run.train()
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-4)
    for mine, other in zip(whole.grads[0], parts.grads[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("options", [
    {"beta": 0.0, "loss_top_k": 8, "lmbda": 0.0}, {"beta": 1.0},
], ids=["rows", "own"])  # fmt: skip
def test_the_student_comes_nearer_to_a_teacher_that_it_never_holds(tmp_path, teacher, options):
    run = trainer(tmp_path, teacher, lora=False, max_steps=15, lr_scheduler_type="constant",
                  max_new_tokens=10, **options)  # fmt: skip
    run.train()
    apart = logged(run, "divergence")
    assert sum(apart[-4:]) < 0.7 * sum(apart[:4])
    texts = {tuple(body["prompt"]) for _, body in teacher.calls}
    assert len(texts) == (6 if options.get("lmbda") == 0 else len(teacher.calls))
    assert math.isfinite(run.evaluate()["eval_divergence"])


# -- failures --------------------------------------------------------------------------------------


def test_a_server_that_cannot_teach_is_named(tmp_path, teacher):
    with pytest.raises(ConfigError, match="needs teacher_model_server_url"):
        trainer(tmp_path, None)
    with pytest.raises(ConfigError, match="no address like"):
        trainer(tmp_path, type("", (), {"url": "localhost"}))
    gone = type("", (), {"url": "http://127.0.0.1:9"})
    with pytest.raises(TrainingError, match="is the server of teacher_model_server_url running"):
        trainer(tmp_path, gone)
    run = trainer(tmp_path, teacher)
    for broken, words in (
        (lambda answer: {"choices": [{"text": "?"}]}, "no prompt_logprobs of the tokens"),
        (lambda answer: {"choices": [{"prompt_logprobs": [None]}]}, "1 prompt_logprobs for"),
        (lambda answer: {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": 0}}]}]},
         "no prompt_logprobs of the tokens"),
    ):  # fmt: skip
        teacher.broken = broken
        with pytest.raises(TrainingError, match=words):
            run.objective.assemble(run.model, [run.train_data], World())
    with pytest.raises(ConfigError, match="leave teacher_model out"):
        ServerDistillationTrainer(tiny.model(), tiny.model(1), args=run.args, train_dataset=ROWS,
                                  processing_class=tiny.tokenizer())  # fmt: skip


def test_a_teacher_with_more_tokens_is_named(tmp_path):
    with teaching(tiny.model(1, vocab_size=300)) as server:
        run = trainer(tmp_path, server, loss_top_k=40, lmbda=0.0)
        with pytest.raises(TrainingError, match="none of the student's 259"):
            run.objective.assemble(run.model, [run.train_data])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.9}, "leave it at 1"),
        ({"loss_top_k": 0}, "loss_top_k=0"),
        ({"loss_add_tail": False}, "one token alone"),
        ({"seq_kd": True}, "before the run"),
        ({"reverse_kl_top_1_mode": "argmax"}, "cannot be asked"),
    ],
)
def test_what_cannot_be_meant_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        ServerDistillationConfig(**options)


def test_topwork_serve_teaches_as_the_teacher_in_this_process_would(tmp_path):
    base = tmp_path / "teacher"
    tiny.model(1).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    runs = []
    with process(base) as url, teaching(tiny.model(1)) as stand_in:
        for name, at in (("served", SimpleNamespace(url=url)), ("stand-in", stand_in)):
            run = trainer(tmp_path / name, at, loss_top_k=3, beta=0.5)
            run.train()
            runs.append(run)
    for name in ("loss", "grad_norm"):
        served, stood_in = (logged(run, name) for run in runs)
        assert served == pytest.approx(stood_in, rel=1e-4)
