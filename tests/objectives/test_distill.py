from __future__ import annotations

import pytest
import torch

import tiny
import topwork
from topwork import DistillationConfig, DistillationTrainer, LoraConfig
from topwork.errors import ConfigError
from topwork.ops import divergence, token_divergence

ROWS = tiny.chats(6)


def distributions(seed=0):
    torch.manual_seed(seed)
    return (torch.randn(5, 11, dtype=torch.float64).log_softmax(1) for _ in range(2))


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p.exp().T, q.exp().T))


def test_the_ends_are_the_two_kls_and_the_middle_is_symmetric():
    student, teacher = distributions()
    torch.testing.assert_close(divergence(student, teacher, 0.0), kl(teacher, student))
    torch.testing.assert_close(divergence(student, teacher, 1.0), kl(student, teacher))
    mean = (0.3 * teacher.exp() + 0.7 * student.exp()).log()
    torch.testing.assert_close(
        divergence(student, teacher, 0.3), 0.3 * kl(teacher, mean) + 0.7 * kl(student, mean)
    )
    torch.testing.assert_close(divergence(student, teacher, 0.5), divergence(teacher, student, 0.5))


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_chunks_give_the_values_and_gradients_of_whole_logits(trained_head, beta):
    torch.manual_seed(0)
    head, other = torch.nn.Linear(8, 31, bias=False), torch.nn.Linear(6, 31, bias=False)
    head.requires_grad_(trained_head)
    student = torch.randn(300, 8, requires_grad=True)
    teacher, weight = torch.randn(300, 6), torch.randn(300)
    found = token_divergence(head, student, other, teacher, beta, 2.0)
    whole = divergence(
        (head(student) / 2).log_softmax(1), (other(teacher) / 2).log_softmax(1).detach(), beta
    )
    torch.testing.assert_close(found, whole)
    wanted = [student, *(head.parameters() if trained_head else ())]
    ours, theirs = (torch.autograd.grad((x * weight).sum(), wanted) for x in (found, whole))
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def trainer(folder, student=None, teacher=None, lora=True, **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "learning_rate": 2e-2,
        "max_steps": 1, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "shuffle": False,
    }  # fmt: skip
    return DistillationTrainer(
        student or tiny.model(0), teacher or tiny.model(1),
        DistillationConfig(**{**values, **options}), ROWS, {"same": ROWS[:2]},
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lora", [True, False])
def test_the_loss_is_the_mean_over_the_trained_tokens_however_cut(tmp_path, beta, lora):
    options = {"beta": beta, "temperature": 1.5, "sft_weight": 0.2, "lora": lora}
    runs = [
        trainer(tmp_path, per_device_train_batch_size=m, gradient_accumulation_steps=6 // m,
                **options)
        for m in (6, 2)
    ]  # fmt: skip
    for run in runs:
        run.train()
    student, teacher = tiny.model(0), tiny.model(1)
    total, tokens = 0.0, 0
    for sample in runs[0].train_data:
        ids = torch.from_numpy(sample.ids).long()
        at = torch.from_numpy(sample.trained).nonzero()[:, 0] - 1
        with torch.no_grad():
            one, two = (m(ids[None]).logits[0, at] for m in (student, teacher))
        apart = divergence((one / 1.5).log_softmax(1), (two / 1.5).log_softmax(1), beta)
        said = one.log_softmax(1).gather(1, ids[at + 1, None])
        total += float(apart.sum() - 0.2 * said.sum())
        tokens += len(at)
    for run in runs:
        assert run.state.log_history[0]["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_student_comes_near_its_teacher_and_the_teacher_stays(tmp_path):
    teacher = tiny.model(1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    run = trainer(tmp_path, teacher=teacher, max_steps=40, lora=False)
    run.train()
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert losses[-1] < 0.3 * losses[0]
    assert run.evaluate()["eval_same_divergence"] < 0.5 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_teachers_may_be_wider_but_not_of_another_vocabulary(tmp_path):
    wide = tiny.model(1, hidden_size=32)
    trainer(tmp_path, teacher=wide).train()
    with pytest.raises(ConfigError, match="vocabularies of 259 and 300"):
        trainer(tmp_path, teacher=tiny.model(1, vocab_size=300))
    student = tiny.model()
    with pytest.raises(ConfigError, match="student itself"):
        trainer(tmp_path, student, student)
    with pytest.raises(ConfigError, match="needs teacher_model"):
        DistillationTrainer(student, train_dataset=ROWS, processing_class=tiny.tokenizer())


@pytest.mark.parametrize(
    ("options", "error"),
    [({"beta": 1.5}, "beta"), ({"temperature": 0}, "temperature"), ({"packing": True}, "packing")],
)
def test_settings_that_cannot_be_meant_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        topwork.DistillationConfig(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_type", "dft"), ("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0),
     ("token_metrics", True), ("streaming", True), ("eval_packing", True)],
)  # fmt: skip
@pytest.mark.parametrize("kind", [DistillationConfig, topwork.GKDConfig, topwork.ULDConfig])
def test_what_fine_tuning_alone_reads_is_refused(kind, name, value):
    with pytest.raises(ConfigError, match=f"{name}=.* is not read by distillation"):
        kind(**{name: value})
