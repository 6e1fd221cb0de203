"""Distillation on the student's own answers, across tokenizers, and from the model itself."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from topwork import (
    DistillationConfig,
    DistillationTrainer,
    GKDConfig,
    GKDTrainer,
    LoraConfig,
    SelfDistillationConfig,
    SelfDistillationTrainer,
    TrainerCallback,
    ULDConfig,
    ULDTrainer,
)
from topwork.errors import ConfigError, DataError
from topwork.objectives.gkd import prompt_of
from topwork.objectives.rollouts import Answer
from topwork.objectives.uld import stretches, token_ends
from topwork.ops import divergence, sorted_distance
from topwork.training.distributed import World

ROWS = tiny.chats(6)
LORA = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}
OPTIONS = {
    "per_device_train_batch_size": 6, "learning_rate": 2e-2, "max_steps": 1, "logging_steps": 1,
    "disable_tqdm": True, "save_strategy": "no", "shuffle": False,
}  # fmt: skip


class Script:
    """Writes one line for each text; remembers which model it was given and the texts."""

    def __init__(self):
        self.seen = []

    def write(self, model, texts, limits, seeds):
        self.seen.append((model, [list(t) for t in texts], limits))
        return [Answer([60 + i, 70, 2], True) for i in range(len(texts))]


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def means(run, name):
    return [e[name] for e in run.state.log_history if name in e]


# -- GKD -------------------------------------------------------------------------------------------


def gkd(folder, kind=GKDTrainer, config=GKDConfig, rows=ROWS, callbacks=(), evals=None, **options):
    torch.manual_seed(2)
    return kind(
        tiny.model(0), tiny.model(1), config(output_dir=str(folder), **{**OPTIONS, **options}),
        rows, evals, processing_class=tiny.tokenizer(), callbacks=callbacks,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def scripted(run):
    writer = Script()
    object.__setattr__(run.objective, "writer", writer)
    return writer


def test_without_own_answers_it_is_the_distillation_of_the_rows(tmp_path):
    settings = {"beta": 0.3, "temperature": 1.4, "sft_weight": 0.2}
    one = gkd(tmp_path / "a", lmbda=0.0, **settings)
    other = gkd(tmp_path / "b", DistillationTrainer, DistillationConfig, **settings)
    for run in (one, other):
        run.train()
    for name in ("loss", "grad_norm", "divergence"):
        assert means(one, name) == means(other, name)


def test_the_student_answers_in_the_place_of_the_last_answer(tmp_path):
    run = gkd(tmp_path, lmbda=1.0, max_new_tokens=9)
    writer = scripted(run)
    (batch,) = run.objective.assemble(run.model, [run.train_data[:2]], World())
    ((model, texts, limits),) = writer.seen
    assert model is run.model
    assert limits == [9, 9]
    for sample, text in zip(run.train_data, texts):
        said = tiny.tokenizer().decode(text)
        assert said.endswith("<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n")
        assert text == sample.ids[: len(text)].tolist()
    order = sorted(range(2), key=lambda i: -len(texts[i]))
    assert batch.targets.tolist() == [t for i in order for t in (60 + i, 70, 2)]
    assert batch.lengths == tuple(len(texts[i]) + 3 for i in order)
    (kept,) = run.objective.assemble(run.model, [run.train_data[:2]])  # evaluation
    assert kept.targets.tolist() != batch.targets.tolist()


def test_answers_are_drawn_from_the_likeliest_tokens_alone(tmp_path):
    run = gkd(tmp_path, lmbda=1.0, top_k=1, max_new_tokens=6)
    first, second = (
        run.objective.assemble(run.model, [run.train_data[:2]], World())[0] for _ in range(2)
    )
    assert first.targets.tolist() == second.targets.tolist()
    for options, words in (({"top_p": 0.0}, "top_p"), ({"top_k": -1}, "top_k=-1")):
        with pytest.raises(ConfigError, match=words):
            GKDConfig(**options)


def test_the_teacher_answers_what_the_student_does_not(tmp_path):
    run = gkd(tmp_path, lmbda=0.5, seq_kd=True, rows=tiny.chats(40))
    writer = scripted(run)
    run.objective.assemble(run.model, [run.train_data], World())
    (student, own, _), (teacher, other, _) = writer.seen
    assert student is run.model
    assert teacher is run.objective.teacher.model
    assert len(own) + len(other) == 40
    assert 8 < len(own) < 32


def test_the_cut_of_a_step_changes_no_gradient(tmp_path):
    whole, parts = Note(), Note()
    options = {"max_grad_norm": 0, "max_new_tokens": 6}
    gkd(tmp_path, callbacks=[whole], **options).train()
    gkd(tmp_path, callbacks=[parts], per_device_train_batch_size=2, gradient_accumulation_steps=3,
        **options).train()  # fmt: skip
    for one, other in zip(whole.grads[0], parts.grads[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_the_student_comes_nearer_to_the_teacher_on_the_rows_too(tmp_path):
    run = gkd(tmp_path, lmbda=1.0, beta=0.0, max_steps=30, evals=ROWS, max_new_tokens=16,
              lr_scheduler_type="constant", learning_rate=1e-2)  # fmt: skip
    before = run.evaluate()["eval_divergence"]
    run.train()
    assert run.evaluate()["eval_divergence"] < 0.9 * before


def test_rows_without_a_prompt_are_named(tmp_path):
    with pytest.raises(DataError, match=r"rows \[0, 1\] have no prompt"):
        gkd(tmp_path, rows=[{"text": "abc"}, {"text": "de"}])
    with pytest.raises(ConfigError, match=r"lmbda=1\.5"):
        gkd(tmp_path, lmbda=1.5)
    trained = np.array([False, True, True, False, True])
    sample = SimpleNamespace(ids=np.arange(5), trained=trained)
    assert prompt_of(sample).tolist() == [0, 1, 2, 3]


# -- ULD -------------------------------------------------------------------------------------------


def uld(folder, rows=ROWS, config=ULDConfig, **options):
    torch.manual_seed(2)
    return ULDTrainer(
        tiny.model(0), tiny.model(1, vocab_size=264, hidden_size=24),
        config(output_dir=str(folder), **{**OPTIONS, **options}), rows, rows,
        processing_class=tiny.tokenizer(), teacher_processing_class=tiny.other_tokenizer(),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "theirs", "wanted"),
    [
        ([1, 2, 3], [1, 2, 3], ([[0], [1], [2]], [[0], [1], [2]])),
        ([1, 2, 3], [3], ([[0, 1, 2]], [[0]])),
        ([2, 3, 6], [1, 3, 4, 6], ([[0, 1], [2]], [[0, 1], [2, 3]])),
        ([0.25, 2], [2], ([[0, 1]], [[0]])),
        ([2, 2], [2, 2], ([[0], [1]], [[0], [1]])),  # an end token each
        ([1, 2], [1, 4], ([[0]], [[0]])),  # one side was cut
        ([1], [2], ([], [])),
    ],
)  # fmt: skip
def test_stretches_end_where_both_sides_do(mine, theirs, wanted):
    found = stretches(mine, theirs)
    assert tuple([list(r) for r in side] for side in found) == wanted


def test_a_token_ends_at_a_byte_and_not_within_a_character():
    one = tiny.tokenizer()
    ids = one("aé!")["input_ids"]
    assert token_ends(one, [*ids, 2], 0.25) == [1, 1.25, 3, 4, 4]


def test_the_sorted_distance_in_chunks_is_that_of_whole_logits():
    torch.manual_seed(0)
    head, other = torch.nn.Linear(8, 31, bias=False), torch.nn.Linear(6, 45, bias=False)
    student = torch.randn(300, 8, requires_grad=True)
    scale = torch.rand(300, requires_grad=True)
    teacher, other_scale, weight = torch.randn(300, 6), torch.rand(300), torch.randn(300)
    found = sorted_distance(head, student, scale, 2.0, other, teacher, other_scale, 0.5)
    p = (head(student) / 2).softmax(1) * scale[:, None]
    q = (other(teacher) / 0.5).softmax(1).detach() * other_scale[:, None]
    p, q = (x.sort(1, descending=True).values for x in (p, q))
    whole = (p - q[:, :31]).abs().sum(1) + q[:, 31:].sum(1)
    torch.testing.assert_close(found, whole)
    wanted = [student, scale, head.weight]
    ours, theirs = (torch.autograd.grad((x * weight).sum(), wanted) for x in (found, whole))
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_distance_equals_the_peers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl.experimental.gold.gold_trainer import ULDLoss

    peer = ULDLoss(
        SimpleNamespace(
            uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.3,
            uld_teacher_temperature=0.8, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
            use_extended_uld=True, uld_token_merge_strategy="bayesian",
        )
    )  # fmt: skip
    rows = [tiny.chat(f"say {i}", t) for i, t in enumerate(("ababab", "sayccc", "xsay ab"))]
    run = uld(tmp_path, rows, temperature=1.3, teacher_temperature=0.8)
    teacher = run.objective.teacher.model
    for sample in run.train_data:
        sides = []
        for one, model, tokenizer in (
            (sample, run.model, tiny.tokenizer()),
            (sample.teacher, teacher, tiny.other_tokenizer()),
        ):  # fmt: skip
            ids = torch.tensor(one.ids)[None].long()
            mask = torch.tensor(one.trained)
            labels = torch.where(mask, ids[0], -100)[None]
            offsets = torch.zeros(1, len(one.ids), 2)
            ends = torch.tensor(token_ends(tokenizer, ids[0][mask].tolist(), 0.5)).float()
            offsets[0, mask, 1] = ends
            sides.append((model(input_ids=ids).logits, labels, ids, offsets))
        (logits, labels, ids, offsets), (t_logits, t_labels, t_ids, t_offsets) = sides
        theirs = peer(logits, t_logits.detach(), labels, t_labels, ids, t_ids, offsets, t_offsets)
        (batch,) = run.objective.assemble(run.model, [[sample]])
        ours = run.objective.loss(run.model, batch).over(run.objective.weight(batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        tensors = [p for p in run.model.parameters() if p.requires_grad]
        slopes = [torch.autograd.grad(x, tensors, retain_graph=True) for x in (ours, theirs)]
        for mine, slope in zip(*slopes):
            torch.testing.assert_close(mine, slope, rtol=1e-3, atol=1e-6)
    assert any(len(r) > 1 for s in run.train_data for r in s.mine)


def test_the_cut_of_a_step_changes_no_loss_and_training_lowers_the_distance(tmp_path):
    options = {"sft_weight": 0.3, "max_steps": 15, "lr_scheduler_type": "constant"}
    one = uld(tmp_path, **options)
    one.train()
    two = uld(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, **options)
    two.train()
    for name in ("loss", "distance", "nll_loss"):
        # Later steps carry the rounding of earlier ones on.
        assert means(one, name)[:8] == pytest.approx(means(two, name)[:8], rel=1e-3)
    assert means(one, "distance")[-1] < 0.9 * means(one, "distance")[0]


def test_a_teacher_that_reads_something_else_is_refused(tmp_path, monkeypatch):
    plain = [{"prompt": "a", "completion": "abc"}, {"prompt": "b", "completion": "say"}]
    run = uld(tmp_path, plain)
    assert "stretches of text end in both tokenizers" in run.notes[-1]
    with pytest.raises(ConfigError, match="teacher_processing_class"):
        ULDTrainer(
            tiny.model(), tiny.model(1), ULDConfig(), ROWS, processing_class=tiny.tokenizer()
        )
    shouting = tiny.other_tokenizer()
    shouting.chat_template = tiny.CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(DataError, match="no row says the same text"):
        ULDTrainer(
            tiny.model(), tiny.model(1, vocab_size=264), ULDConfig(output_dir=str(tmp_path)), ROWS,
            processing_class=tiny.tokenizer(), teacher_processing_class=shouting,
        )  # fmt: skip


# -- self-distillation -----------------------------------------------------------------------------

ADVISED = [{"prompt": f"ask {i}", "privileged_context": f"it is {i}"} for i in range(4)]


def advised(folder, rows=ADVISED, **options):
    torch.manual_seed(2)
    values = {**OPTIONS, "per_device_train_batch_size": 4, "max_completion_length": 6}
    return SelfDistillationTrainer(
        tiny.model(), SelfDistillationConfig(output_dir=str(folder), **{**values, **options}),
        rows, processing_class=tiny.tokenizer(), peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def logits_of(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("teacher", ["start", "self"])
def test_the_teacher_reads_more_and_judges_the_same_answers(tmp_path, teacher):
    run = advised(tmp_path, teacher=teacher, beta=0.4, temperature=1.3, num_generations=2)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    run.objective.writer = Script()
    (batch,) = run.objective.assemble(run.model, [run.train_data[:2]], World())
    total = 0.0
    for k, sample in enumerate(run.train_data[:2]):
        said = tiny.tokenizer().decode(sample.teacher.tolist())
        assert said == run.args.teacher_prompt_template.format(
            prompt=f"ask {k}", privileged_context=f"it is {k}"
        )
        for i in (2 * k, 2 * k + 1):
            answer = [60 + i, 70, 2]
            own = (logits_of(run.model, sample.ids.tolist(), answer) / 1.3).log_softmax(-1)
            with torch.no_grad():
                if teacher == "self":
                    other = logits_of(run.model, sample.teacher.tolist(), answer)
                else:
                    with run.model.disable_adapter():
                        other = logits_of(run.model, sample.teacher.tolist(), answer)
            total = total + divergence(own, (other / 1.3).log_softmax(-1), 0.4).sum()
    ours = run.objective.loss(run.model, batch)
    torch.testing.assert_close(ours.total, total, rtol=1e-4, atol=1e-5)
    assert run.objective.weight(batch) == 12


def test_a_teacher_may_follow_and_is_part_of_checkpoints(tmp_path):
    options = {"teacher": "ema", "ref_model_mixup_alpha": 0.5, "max_steps": 4}
    whole = advised(tmp_path / "whole", **options)
    whole.train()
    ref = whole.model.adapter_state("ref")
    assert any((t - s).abs().max() > 1e-4 for t, s in
               zip(ref.values(), whole.model.adapter_state().values()))  # fmt: skip
    first = advised(tmp_path / "cut", **options, save_steps=2)
    first.args.save_strategy = "steps"
    first.train()
    second = advised(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-2")
    assert means(second, "loss") == means(whole, "loss")
    for name, tensor in second.model.adapter_state("ref").items():
        assert torch.equal(tensor, ref[name])


def test_messages_carry_the_context_in_the_last_one(tmp_path):
    rows = [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
             "privileged_context": [{"role": "assistant", "content": "42"}]}] * 4  # fmt: skip
    run = advised(tmp_path, rows, teacher_prompt_template="{prompt}/{privileged_context}")
    assert "user\nu/42<|im_end|>" in tiny.tokenizer().decode(run.train_data[0].teacher.tolist())


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ([{"prompt": "a"}], {}, DataError, "row 0 has no `privileged_context`"),
        (ADVISED, {"teacher": "other"}, ConfigError, "one of start, self, ema"),
        (ADVISED, {"teacher_prompt_template": "{prompt}"}, ConfigError, "privileged_context"),
        (ADVISED, {"num_generations": 3}, ConfigError, "multiple of num_generations=3"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path, rows, options, error, words):
    with pytest.raises(error, match=words):
        advised(tmp_path, rows, **options)
