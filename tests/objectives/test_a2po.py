"""A*-PO: what a prompt is worth, the regression against TRL's, and runs."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from datasets import Dataset

import tiny
from topwork import A2POConfig, A2POTrainer, LoraConfig, TrainerCallback
from topwork.errors import ConfigError, TrainingError
from topwork.objectives import a2po
from topwork.objectives.draws import Drawn
from topwork.objectives.rollouts import Answer, EngineWriter

ROWS = [{"prompt": f"go {i}", "top": 100 + 20 * i} for i in range(4)]
LORA = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}


def share(completion_ids, top, **_):
    """The share of an answer's tokens below its row's `top`."""
    return [sum(i < x for i in ids) / len(ids) for ids, x in zip(completion_ids, top)]


def trainer(folder, rows=ROWS, reward=share, lora=True, callbacks=(), evals=None, **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_completion_length": 6,
        "learning_rate": 1e-2, "logging_steps": 1, "seed": 3, "disable_tqdm": True,
        "save_strategy": "no", "max_steps": 2, "shuffle": False, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    torch.manual_seed(2)
    return A2POTrainer(
        tiny.model(), reward, A2POConfig(**{**values, **options}), rows, evals,
        processing_class=tiny.tokenizer(), callbacks=callbacks,
        peft_config=LoraConfig(**LORA) if lora else None,
    )  # fmt: skip


def logged(run, name):
    return [e[name] for e in run.state.log_history if name in e]


# -- the peer --------------------------------------------------------------------------------------

ANSWERS = [[65, 66, 67, 68, 2], [70, 71, 2], [172, 73, 174, 75], [80, 2]]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base, policy = tiny.model(), tiny.model(1)
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        for p, q in zip(policy.parameters(), base.parameters()):
            p.mul_(0.2).add_(q)
    policy.save_pretrained(folder / "policy")
    tiny.tokenizer().save_pretrained(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.a2po import A2POConfig as PeerConfig
    from trl.experimental.a2po import A2POTrainer as Peer

    args = PeerConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, per_device_train_batch_size=4, beta1=0.3, beta2=0.2,
        num_value_samples=2,
    )  # fmt: skip
    load = transformers.AutoModelForCausalLM.from_pretrained
    made = Peer(
        load(folder / "policy"), share, args, Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )  # fmt: skip
    made.ref_model = load(folder / "base").eval()
    yield made, policy, base
    patch.undo()


def test_the_regression_equals_the_peers(peer, tmp_path):
    made, policy, base = peer
    run = trainer(tmp_path, lora=False, beta2=0.2)
    run.model.load_state_dict(policy.state_dict())
    run.objective.reference.model.load_state_dict(base.state_dict())
    earned, values = torch.tensor([1.0, 0.0, 1.0, 0.5]), [0.3, 0.1, 0.2, 0.6]
    drawn = [
        Drawn(prompt, [Answer(list(ids), ids[-1] == 2)], earned[i].view(1, 1))
        for i, (prompt, ids) in enumerate(zip(run.train_data, ANSWERS))
    ]
    ours = run.objective.loss(run.model, run.objective._rollout(run.model, drawn, values))
    mine = ours.total / 4
    mine.backward()

    prompt, size = len(run.train_data[0]), max(map(len, ANSWERS))
    ids = torch.zeros(4, prompt + size, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, answer) in enumerate(zip(run.train_data, ANSWERS)):
        whole = [*row.ids.tolist(), *answer]
        ids[i, : len(whole)], mask[i, : len(whole)] = torch.tensor(whole), 1
    with torch.no_grad():
        start = made._get_sequence_logps(made.ref_model, ids, mask, size)
    made.model.zero_grad()
    theirs = made.compute_loss(
        made.model,
        {"input_ids": ids, "attention_mask": mask, "logits_to_keep": size, "ref_logps": start,
         "rewards": earned, "v_star": torch.tensor(values)},
    )  # fmt: skip
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for name, parameter in made.model.named_parameters():
        own = run.model.get_parameter(name).grad
        assert (own - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-7, name


def test_a_prompts_worth_equals_the_peers(peer, tmp_path, monkeypatch):
    made, _, _ = peer
    said = [[60 + 7 * i, 70 + 11 * i, 2] for i in range(8)]

    def generate(input_ids, **_):
        return torch.cat([input_ids.repeat_interleave(2, 0), torch.tensor(said)], 1)

    monkeypatch.setattr(made.ref_model, "generate", generate)

    def near(completions, top, **_):
        return [float(len(c) % 5) * t / 100 for c, t in zip(completions, top)]

    monkeypatch.setattr(made, "reward_funcs", [near])
    made._estimate_optimal_values()
    run = trainer(tmp_path, reward=near, num_value_samples=2, beta1=0.3)

    def write(self, model, texts, limits, seeds):
        return [Answer(list(ids), True) for ids in said]

    monkeypatch.setattr(EngineWriter, "write", write)
    run._estimate(run.objective, False)
    theirs = [made._optimal_values[row["prompt"]] for row in ROWS]
    assert list(run.objective.values.values()) == pytest.approx(theirs, rel=1e-6)
    assert len(set(theirs)) > 1


# -- formulas and runs -----------------------------------------------------------------------------


def test_the_worth_lies_between_the_mean_and_the_best():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = a2po.optimal_values(rewards, 0.5)
    wanted = 0.5 * math.log((2 + 2 * math.exp(2)) / 4)
    assert found.tolist() == pytest.approx([wanted, 0.0], abs=1e-6)
    assert a2po.optimal_values(rewards, 1e-3)[0] == pytest.approx(1.0, abs=1e-2)
    assert a2po.optimal_values(rewards, 1e3)[0] == pytest.approx(0.5, abs=1e-2)


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def test_the_cut_of_a_step_changes_neither_loss_nor_gradients(tmp_path):
    whole, parts = Note(), Note()
    options = {"max_steps": 1, "max_grad_norm": 0, "num_generations": 2, "beta2": 0.1}
    one = trainer(tmp_path, per_device_train_batch_size=8, callbacks=[whole], **options)
    two = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4,
                  callbacks=[parts], **options)  # fmt: skip
    one.train()
    two.objective.values = one.objective.values  # whose draws are cut as the steps are
    two.train()
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-4)
    for mine, other in zip(whole.grads[0], parts.grads[0]):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-7)


def test_prompts_without_hope_are_dropped_and_the_same_text_may_be_worth_two_things(tmp_path):
    rows = [{"prompt": "go", "top": 0}, {"prompt": "go", "top": 300}, {"prompt": "on", "top": 150}]
    run = trainer(tmp_path, rows, num_value_samples=4)
    run.train()
    assert [p.row for p in run.train_data] == [1, 2]
    assert list(run.objective.values.values())[:2] == pytest.approx([0.0, 1.0], abs=1e-6)
    assert any("1 of them dropped" in line for line in run.notes)
    with pytest.raises(TrainingError, match="raise num_value_samples"):
        trainer(tmp_path, rows[:1]).train()
    assert len(trainer(tmp_path, rows, filter_all_incorrect=False).train_data) == 3


def test_a_resumed_run_knows_what_the_prompts_are_worth(tmp_path):
    options = {"max_steps": 4, "beta2": 0.1}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    first = trainer(tmp_path / "cut", save_steps=2, **options)
    first.args.save_strategy = "steps"
    first.train()
    second = trainer(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-2")
    assert second.objective.values == whole.objective.values
    assert logged(second, "loss")[-2:] == logged(whole, "loss")[-2:]


def test_the_policy_comes_to_what_is_best_at_this_temperature(tmp_path):
    """π_start·exp(reward/β), in closed form for answers of one token; held-out prompts too."""

    def chance(run):
        ids = torch.tensor(run.train_data[0].ids[None]).long()
        with torch.no_grad():
            return run.model(input_ids=ids).logits[0, -1].softmax(-1)[:100].sum().item()

    run = trainer(tmp_path, ROWS[:1] * 4, evals=[{"prompt": "then", "top": 120}], lora=False,
                  num_value_samples=32, beta1=0.5, beta2=0.5, max_completion_length=1,
                  num_generations=16, per_device_train_batch_size=64, max_steps=30,
                  per_device_eval_batch_size=16, learning_rate=2e-2)  # fmt: skip
    start = chance(run)
    run.train()
    best = start * math.exp(2) / (start * math.exp(2) + 1 - start)
    assert best > start + 0.4
    assert chance(run) == pytest.approx(best, abs=0.08)
    assert math.isfinite(run.evaluate()["eval_loss"])
    assert len(run.objective.values) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta1": 0}, "beta1=0 must be above 0"),
        ({"num_value_samples": 0}, "num_value_samples"),
        ({"importance_correction": "token_mask"}, "a regression holds whoever wrote"),
    ],
)
def test_what_cannot_be_meant_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        A2POConfig(**options)
