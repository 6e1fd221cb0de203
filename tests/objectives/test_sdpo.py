"""SDPO: who teaches whom, its losses against TRL's and against formulas, and its checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from datasets import Dataset

import tiny
from topwork import LoraConfig, SDPOConfig, SDPOTrainer, TrainerCallback
from topwork.errors import ConfigError, DataError
from topwork.objectives.draws import Drawn
from topwork.objectives.reference import Reference
from topwork.objectives.rollouts import Answer
from topwork.ops import Likeliest, divergence, token_divergence

ROWS = [{"prompt": f"go {i}", "privileged_context": f"it is {i}"} for i in range(4)]
TEMPLATES = {
    "reprompt_template": "{prompt}|{solution}|{feedback}!",
    "solution_template": "={successful_previous_attempt}",
    "feedback_template": "#{feedback_raw}",
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj", "down_proj"]}


def longest(completion_ids, **_):
    """1 for the longer answers."""
    return [float(len(ids) > 3) for ids in completion_ids]


def trainer(folder, rows=ROWS, reward=longest, lora=True, callbacks=(), **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 6, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3,
        "disable_tqdm": True, "save_strategy": "no", "max_steps": 2, "shuffle": False,
    }  # fmt: skip
    torch.manual_seed(2)
    return SDPOTrainer(
        tiny.model(), reward, SDPOConfig(**{**values, **TEMPLATES, **options}), rows,
        processing_class=tiny.tokenizer(), callbacks=callbacks,
        peft_config=LoraConfig(**LORA) if lora else None,
    )  # fmt: skip


ANSWERS = [[65, 66, 67, 68, 2], [70, 71, 2], [72, 73, 74, 75], [80, 2]]
SCORES = torch.tensor([[0.0], [1.0], [1.0], [0.0]])


def drawn(run, scores=SCORES):
    """A group of four answers to the first prompt, of which the middle two succeeded."""
    answers = [Answer(list(ids), ids[-1] == 2) for ids in ANSWERS]
    return Drawn(run.train_data[0], answers, scores)


def texts(run, batch):
    """Each teacher's prompt."""
    found, at = [], 0
    for entry in batch.teacher.lengths:
        begin = entry[0] if isinstance(entry, tuple) else None
        size = sum(entry) if isinstance(entry, tuple) else entry
        ids = batch.teacher.input_ids[0, at : at + (begin or size)].tolist()
        found.append(tiny.tokenizer().decode(ids, skip_special_tokens=True))
        at += size
    return found


def test_what_succeeded_teaches_the_others_and_each_other(tmp_path):
    run = trainer(tmp_path)
    batch = run.objective._rollout(run.model, [drawn(run)], torch.zeros(1, 4))
    say = {k: tiny.tokenizer().decode(ANSWERS[k], skip_special_tokens=True) for k in range(4)}
    assert batch.taught.tolist() == [True] * 4
    assert texts(run, batch) == [
        f"go 0|={say[1]}|!" + say[0],
        f"go 0|={say[2]}|!" + say[1],
        f"go 0|={say[1]}|!",  # read once for two answers
    ]
    assert batch.teacher.targets.tolist() == batch.batch.targets.tolist()


def test_what_nobody_can_be_taught_is_left_alone(tmp_path):
    one = torch.tensor([[0.0], [0.5], [1.0], [0.0]])
    run = trainer(tmp_path)
    batch = run.objective._rollout(run.model, [drawn(run, one)], torch.zeros(1, 4))
    assert batch.taught.tolist() == [True, True, False, True]
    none = run.objective._rollout(run.model, [drawn(run, one * 0.5)], torch.zeros(1, 4))
    assert none.teacher is None
    assert run.objective.loss(run.model, none).total.item() == 0
    told = trainer(tmp_path, include_environment_feedback=True)
    batch = told.objective._rollout(told.model, [drawn(told, one)], torch.zeros(1, 4))
    assert texts(told, batch)[1].startswith("go 0||#it is 0!")
    short = trainer(tmp_path, max_reprompt_len=9)
    batch = short.objective._rollout(short.model, [drawn(short)], torch.zeros(1, 4))
    assert batch.taught.tolist() == [False, False, False, False]


def test_messages_are_retold_in_the_last_one(tmp_path):
    ask = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    run = trainer(tmp_path, [{"prompt": ask}] * 4, remove_thinking_from_demonstration=True)
    one = drawn(run)
    thought = tiny.tokenizer()("<think>hm</think> so")["input_ids"]
    one.answers[1] = Answer([*thought, 2], True)
    said = texts(run, run.objective._rollout(run.model, [one], torch.zeros(1, 4)))[0]
    assert "s\n" in said
    assert "user\nu|=so|!" in said
    bad = trainer(tmp_path, [{"prompt": [*ask, {"role": "assistant", "content": "a"}]}] * 4)
    with pytest.raises(DataError, match="row 0: the teacher's prompt goes on from the user's"):
        bad.objective._rollout(bad.model, [drawn(bad)], torch.zeros(1, 4))


# -- the peer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdpo import SDPOConfig as PeerConfig
    from trl.experimental.sdpo import SDPOTrainer as Peer

    args = PeerConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=6, teacher_model_kind="live", **TEMPLATES,
    )  # fmt: skip
    made = Peer(
        transformers.AutoModelForCausalLM.from_pretrained(folder), lambda completions, **_: [0.0],
        args, Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )  # fmt: skip
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    tiny.model(1).save_pretrained(folder / "teacher")
    made.teacher_model = transformers.AutoModelForCausalLM.from_pretrained(folder / "teacher")
    yield made
    patch.undo()


def rows(parts, side):
    width = max(map(len, parts))
    ids, mask = torch.zeros(2, len(parts), width, dtype=torch.long)
    for i, part in enumerate(parts):
        where = slice(width - len(part), width) if side == "left" else slice(len(part))
        ids[i, where], mask[i, where] = torch.tensor(part), 1
    return ids, mask


CASES = [
    {},
    {"temperature": 0.7},
    {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    {"distillation_mode": "full_logits", "distillation_alpha": 0.3, "temperature": 1.4},
    {"distillation_mode": "topk_logits", "distillation_topk": 5},
    {"distillation_mode": "topk_logits", "distillation_topk": 7, "distillation_alpha": 0.5,
     "distillation_add_tail": True},
    {"distillation_weight": 0.3, "loss_type": "grpo"},
    {"distillation_weight": 0.6, "loss_type": "dapo", "epsilon_high": 0.1,
     "distillation_is_clip": 1.1},
    {"distillation_weight": 0.0, "loss_type": "dr_grpo"},
]  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "old"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts_losses_and_gradients_equal_the_peers(peer, tmp_path, case, old):
    run = trainer(tmp_path, lora=False, include_environment_feedback=True, **case)
    scores = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    advantages = torch.tensor([[-0.5, 1.5, -0.5, -0.5]])
    group = drawn(run, scores)
    # Nothing is said to the one that succeeded.
    group.prompt = replace(group.prompt, columns={**group.prompt.columns, "privileged_context": ""})
    batch = run.objective._rollout(run.model, [group], advantages)
    teacher = tiny.model(1)
    run.objective.teacher = Reference(teacher)
    torch.manual_seed(4)
    drift = 0.3 * torch.randn(len(batch.batch.targets))
    if old:
        batch.old = run.objective._logprobs(run.model, batch).detach() + drift
    ours = run.objective.loss(run.model, batch)
    ours = ours.over([run.objective.weight(batch)] if ours.total.dim() == 0
                     else run.objective.weight(batch))  # fmt: skip
    ours.backward()

    prompt = run.train_data[0].ids.tolist()
    prompt_ids, prompt_mask = rows([prompt] * 4, "left")
    ids, mask = rows(ANSWERS, "right")
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids,
              "completion_mask": mask, "advantages": advantages[0]}  # fmt: skip
    for name, value in {"distillation_weight": 1.0, "distillation_mode": "sampled_token",
                        "distillation_alpha": 1.0, "distillation_topk": None,
                        "distillation_add_tail": False, "distillation_is_clip": 2.0,
                        "include_environment_feedback": True, **case}.items():  # fmt: skip
        setattr(peer.args, name, value)
    peer.temperature = case.get("temperature", 1.0)
    peer.loss_type = case.get("loss_type", "dapo")
    peer.epsilon_low, peer.epsilon_high = 0.2, case.get("epsilon_high", 0.2)
    inputs |= peer.teacher_context_builder.build(
        inputs, ["go 0"] * 4, scores[:, 0], feedbacks=[""] * 4
    )
    if old:
        inputs["old_per_token_logps"] = torch.zeros(mask.shape)
        inputs["old_per_token_logps"][mask.bool()] = batch.old
    peer.model.zero_grad()
    theirs = peer.compute_loss(peer.model, inputs)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, parameter in peer.model.named_parameters():
        mine = run.model.get_parameter(name).grad
        assert (mine - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-7, name


# -- formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [False, True])
def test_the_likeliest_tokens_are_the_students_and_the_rest_is_one_token(rest):
    torch.manual_seed(0)
    head, other = torch.nn.Linear(8, 31, bias=False), torch.nn.Linear(6, 31, bias=False)
    student, teacher = torch.randn(5, 8), torch.randn(5, 6)
    found = token_divergence(head, student, other, teacher, 1.0, 0.5, Likeliest(4, rest))
    p, q = (head(student) / 0.5).softmax(1), (other(teacher) / 0.5).softmax(1)
    for i in range(5):
        top = p[i].sort(descending=True).indices[:4]
        one, two = p[i, top], q[i, top]
        if rest:
            one, two = (torch.cat([x, 1 - x.sum()[None]]) for x in (one, two))
        else:
            one, two = one / one.sum(), two / two.sum()
        torch.testing.assert_close(found[i], (one * (one / two).log()).sum())
    every = token_divergence(head, student, other, teacher, 0.3, 1.0, Likeliest(99))
    whole = divergence(head(student).log_softmax(1), other(teacher).log_softmax(1), 0.3)
    torch.testing.assert_close(every, whole)


# -- runs ------------------------------------------------------------------------------------------


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def logged(run, name):
    return [e[name] for e in run.state.log_history if name in e]


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_the_cut_of_a_step_changes_neither_loss_nor_gradients(tmp_path, weight):
    """The peer divides its policy loss by each micro-batch's tokens."""
    whole, parts = Note(), Note()
    options = {"max_steps": 1, "max_grad_norm": 0, "distillation_weight": weight, "rows": ROWS[:2]}
    one = trainer(tmp_path, per_device_train_batch_size=8, callbacks=[whole], **options)
    two = trainer(tmp_path, gradient_accumulation_steps=2, callbacks=[parts], **options)
    for run in (one, two):
        run.train()
    assert 0 < logged(one, "distillation/taught_fraction")[0] <= 1
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-4)
    for mine, other in zip(whole.grads[0], parts.grads[0]):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_teacher_that_follows_and_its_answers_are_part_of_checkpoints(tmp_path, lora):
    options = {"num_iterations": 2, "max_steps": 4, "ref_model_mixup_alpha": 0.5, "lora": lora}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    first = trainer(tmp_path / "cut", save_steps=1, **options)
    first.args.save_strategy = "steps"
    first.train()
    second = trainer(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-3")
    assert logged(second, "loss")[-1] == logged(whole, "loss")[-1]
    assert any(loss != 0 for loss in logged(whole, "loss"))
    theirs, mine = (r.objective.teacher.state(r.model) for r in (whole, second))
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name])


def test_the_chance_of_what_succeeds_rises(tmp_path):
    def low(completion_ids, **_):
        return [float(sum(i < 100 for i in ids) > len(ids) / 2) for ids in completion_ids]

    run = trainer(tmp_path, reward=low, max_steps=30, per_device_train_batch_size=16,
                  num_generations=8, learning_rate=2e-2, lr_scheduler_type="constant",
                  distillation_mode="full_logits", distillation_weight=0.5,
                  teacher="self")  # fmt: skip
    run.train()
    rewards = logged(run, "reward")
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distillation_mode": "topk"}, "nearest: 'topk_logits'"),
        ({"distillation_alpha": 0.5}, "take full_logits"),
        ({"distillation_topk": 5}, "goes with distillation_mode"),
        ({"beta": 0.1}, "no reference beside the teacher"),
        ({"use_successful_as_teacher": False}, "would know nothing more"),
        ({"teacher_model_kind": "live"}, "it is called teacher"),
        ({"reprompt_template": "{prompt}{solution}"}, r"lacks \{feedback\}"),
    ],
)
def test_what_cannot_be_meant_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        SDPOConfig(**options)
