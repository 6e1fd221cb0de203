from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset

import tiny
from topwork import (
    LoraConfig,
    NashMDConfig,
    NashMDTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    XPOConfig,
    XPOTrainer,
    get_peft_model,
)
from topwork.errors import ConfigError
from topwork.objectives.online import write_mixed
from topwork.objectives.reference import Reference
from topwork.objectives.rollouts import Answer, read_prompts
from topwork.training.distributed import World

ROWS = [{"prompt": f"go {i}", "top": 100} for i in range(6)]
LORA = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}
KINDS = {
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig),
    "xpo": (XPOTrainer, XPOConfig),
    "nash_md": (NashMDTrainer, NashMDConfig),
}
PROMPT = [5, 6, 7]
ANSWERS = [[10, 11, 2], [12, 13, 14, 15], [16, 2], [17, 18, 19, 2]]
SCORES = [0.3, 0.9, 0.8, 0.1]


def share(completion_ids, top, **_):
    """The share of an answer's tokens below its row's `top`."""
    return [sum(i < x for i in ids) / len(ids) for ids, x in zip(completion_ids, top)]


def given(completion_ids, **_):
    """The score of each of the answers above."""
    return [SCORES[ANSWERS.index(list(ids))] for ids in completion_ids]


class Script:
    """Writes the answers above, one after the other."""

    def __init__(self, answers=ANSWERS):
        self.left, self.options = list(answers), {}

    def follow(self, model, step):
        pass

    def write(self, model, texts, limits, seeds):
        found, self.left = self.left[: len(texts)], self.left[len(texts) :]
        return [Answer(ids, ids[-1] == 2) for ids in found]


def trainer(folder, name, reward=share, rows=ROWS, ref_model=None, lora=True, **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "logging_steps": 1,
        "max_completion_length": 8, "learning_rate": 2e-2, "disable_tqdm": True,
        "save_strategy": "no", "max_steps": 2,
    }  # fmt: skip
    kind, config = KINDS[name]
    torch.manual_seed(2)
    return kind(
        tiny.model(), ref_model, reward, config(**{**values, **options}), rows,
        processing_class=tiny.tokenizer(), peft_config=LoraConfig(**LORA) if lora else None,
    )  # fmt: skip


def means(run, name):
    return [e[name] for e in run.state.log_history if name in e]


def logprob(model, answer, prompt=PROMPT):
    """log π of each token of an answer, from whole logits."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(answer)[:, None])[:, 0]


# -- online DPO ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_loss_equals_the_peer(tmp_path, monkeypatch, loss_type):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.online_dpo import OnlineDPOConfig as PeerConfig
    from trl.experimental.online_dpo import OnlineDPOTrainer as PeerTrainer

    for seed, name in ((0, "base"), (3, "ref")):
        tiny.model(seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    peer = PeerTrainer(
        load(tmp_path / "base"), load(tmp_path / "ref"), given,
        PeerConfig(
            output_dir=str(tmp_path / "peer"), use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, per_device_train_batch_size=2, beta=0.4,
            loss_type=loss_type, missing_eos_penalty=0.5,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "base"),
    )  # fmt: skip
    rows = torch.zeros(4, 4, dtype=torch.long)
    mask = torch.zeros(4, 4, dtype=torch.long)
    for i, k in enumerate((0, 2, 1, 3)):  # the peer's order: first answers, then second ones
        rows[i, : len(ANSWERS[k])], mask[i, : len(ANSWERS[k])] = torch.tensor(ANSWERS[k]), 1
    prompt = torch.tensor([PROMPT] * 4)
    monkeypatch.setattr(
        peer, "_generate", lambda *_: (prompt, torch.ones_like(prompt), rows, mask, None)
    )
    scores = torch.tensor([SCORES[k] for k in (0, 2, 1, 3)])
    monkeypatch.setattr(peer, "_calculate_rewards_from_functions", lambda **_: scores.clone())
    theirs = peer.training_step(peer.model, {"prompt": ["a", "a"]})

    run = trainer(
        tmp_path / "ours", "online_dpo", given, lora=False, ref_model=tiny.model(3), beta=0.4,
        loss_type=loss_type, missing_eos_penalty=0.5,
    )  # fmt: skip
    run.objective.draw.writer = Script()
    prompts = read_prompts([{"prompt": "a"}] * 2, tiny.tokenizer(), None)[0]
    for one in prompts:
        object.__setattr__(one, "ids", torch.tensor(PROMPT).int().numpy())
    (batch,) = run.objective.assemble(run.model, [prompts], World())
    ours = run.objective.loss(run.model, batch).over([run.objective.weight(batch)])
    ours.backward()
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
    for name, parameter in peer.model.named_parameters():
        mine = run.model.get_parameter(name).grad
        assert (mine - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-7, name


def test_the_best_and_the_worst_of_more_answers_make_the_pair(tmp_path):
    run = trainer(tmp_path, "online_dpo", given, num_generations=4)
    run.objective.draw.writer = Script()
    (batch,) = run.objective.assemble(run.model, [run.train_data[:1]], World())
    assert batch.batch.targets.tolist() == [*ANSWERS[1], *ANSWERS[3]]
    assert batch.metrics["reward"] == (pytest.approx(sum(SCORES)), 4.0)


def test_answers_that_earn_the_same_teach_nothing(tmp_path):
    run = trainer(tmp_path, "online_dpo", lambda completions, **_: [1.0] * len(completions))
    run.train()
    assert means(run, "ties") == [1.0, 1.0]
    assert means(run, "grad_norm") == [0.0, 0.0]


@pytest.mark.parametrize("name", KINDS)
def test_training_raises_the_reward(tmp_path, name):
    seen = []

    def watched(**columns):
        found = share(**columns)
        own = found if name == "online_dpo" else found[::2]  # the others are the opponent's
        seen.append(sum(own) / len(own))
        return [20 * x for x in found] if name == "nash_md" else found

    run = trainer(
        tmp_path, name, watched, rows=ROWS[::2] * 8, per_device_train_batch_size=48,
        learning_rate=2e-2, max_steps=30, lr_scheduler_type="constant", beta=0.05,
    )  # fmt: skip
    run.train()
    assert sum(seen[-10:]) / 10 > sum(seen[:4]) / 4 + 0.06


# -- XPO -------------------------------------------------------------------------------------------


def test_xpo_pairs_the_policy_with_the_reference_and_leaves_the_latter(tmp_path):
    run = trainer(tmp_path, "xpo", given, alpha=0.3, beta=0.4, lora=False, ref_model=tiny.model(3))
    run.objective.draw.writer = Script([ANSWERS[0], ANSWERS[2], ANSWERS[1], ANSWERS[3]])
    prompts = run.train_data[:2]
    for one in prompts:
        object.__setattr__(one, "ids", torch.tensor(PROMPT).int().numpy())
    (batch,) = run.objective.assemble(run.model, [prompts], World())
    # own answers 0 and 2, the reference's 1 and 3: of the first pair the reference's is better
    order = (1, 0, 2, 3)
    assert batch.batch.targets.tolist() == [i for k in order for i in ANSWERS[k]]
    assert batch.explored.tolist() == [1, 0, 0, 1]
    new = [logprob(run.model, ANSWERS[k]).sum() for k in order]
    with torch.no_grad():
        ref = [logprob(run.objective.reference.model, ANSWERS[k]).sum() for k in order]
    pairs = [F.logsigmoid(0.4 * (new[i] - ref[i] - new[i + 1] + ref[i + 1])) for i in (0, 2)]
    wanted = (-pairs[0] - pairs[1] + 0.3 * (new[0] + new[3])) / 2
    ours = run.objective.loss(run.model, batch).over([run.objective.weight(batch)])
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["xpo", "nash_md"])
def test_below_a_new_adapter_the_opponent_is_the_base(tmp_path, name):
    run = trainer(tmp_path, name, max_steps=1, per_device_train_batch_size=8)
    with torch.no_grad():
        for path, parameter in run.model.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=2.0)
    options = {"mixture_coef": 1.0} if name == "nash_md" else {}
    for key, value in options.items():
        setattr(run.args, key, value)
    seen = []

    def watch(completion_ids, **_):
        seen.extend(completion_ids)
        return [0.0] * len(completion_ids)

    run.objective.draw.jury = type(run.objective.draw.jury)([watch])
    run.objective.assemble(run.model, [run.train_data], World())
    prompts = [p.ids.tolist() for p in run.train_data]
    with torch.no_grad():
        own = sum(float(logprob(run.model, a, p).sum()) for a, p in zip(seen[::2], prompts))
        other = sum(float(logprob(run.model, a, p).sum()) for a, p in zip(seen[1::2], prompts))
        with run.model.disable_adapter():
            plain = sum(float(logprob(run.model, a, p).sum()) for a, p in zip(seen[1::2], prompts))
    size = sum(len(a) for a in seen[::2]), sum(len(a) for a in seen[1::2])
    assert own / size[0] > other / size[1] + 0.5  # the policy finds its own answers likelier
    assert plain / size[1] > other / size[1] + 0.5  # and the base its own


# -- Nash-MD ---------------------------------------------------------------------------------------


def test_nash_md_is_a_policy_gradient_against_the_mixture(tmp_path, monkeypatch):
    run = trainer(tmp_path, "nash_md", given, beta=0.4, lora=False, ref_model=tiny.model(3))
    run.objective.draw.writer = Script([ANSWERS[0], ANSWERS[2]])
    monkeypatch.setattr(
        "topwork.objectives.online.write_mixed",
        lambda *_: [Answer(ANSWERS[1], False), Answer(ANSWERS[3], True)],
    )
    prompts = run.train_data[:2]
    for one in prompts:
        object.__setattr__(one, "ids", torch.tensor(PROMPT).int().numpy())
    (batch,) = run.objective.assemble(run.model, [prompts], World())
    assert batch.batch.targets.tolist() == [*ANSWERS[0], *ANSWERS[2]]
    wanted = 0.0
    for mine, other in ((0, 1), (2, 3)):
        win = 1 / (1 + math.exp(SCORES[other] - SCORES[mine]))
        new = logprob(run.model, ANSWERS[mine])
        with torch.no_grad():
            ref = logprob(run.objective.reference.model, ANSWERS[mine])
        wanted = wanted + 0.4 * ((new.detach() - ref) * new).sum() - (win - 0.5) * new.sum()
    ours = run.objective.loss(run.model, batch).over([run.objective.weight(batch)])
    torch.testing.assert_close(ours, wanted / 2, rtol=1e-5, atol=1e-6)


def test_the_mixture_is_geometric():
    policy, other = tiny.model(0), tiny.model(3)
    prompts = read_prompts([{"prompt": "ab"}, {"prompt": "a longer one"}], tiny.tokenizer(), None)
    prompts = [*prompts[0]] * 700
    args = NashMDConfig(max_completion_length=1, mixture_coef=0.3, temperature=0.9)
    torch.manual_seed(0)
    found = write_mixed(policy, Reference(other), prompts, args, tiny.tokenizer())
    for k in range(2):
        ids = torch.tensor(prompts[k].ids)[None].long()
        with torch.no_grad():
            mixed = 0.7 * policy(ids).logits[0, -1].log_softmax(-1)
            mixed = mixed + 0.3 * other(ids).logits[0, -1].log_softmax(-1)
        chances = (mixed / 0.9).softmax(-1)
        drawn = torch.tensor([a.ids[0] for a in found[k::2]])
        counts = torch.bincount(drawn, minlength=len(chances)) / len(drawn)
        assert ((counts - chances).abs() < 4 * (chances / 700).sqrt() + 3e-3).all()


def test_mixed_answers_of_several_tokens_are_what_both_models_would_say():
    model = get_peft_model(tiny.model(), LoraConfig(**LORA, init_lora_weights=False))
    prompts = read_prompts([{"prompt": "ab"}, {"prompt": "a longer one"}], tiny.tokenizer(), None)[
        0
    ]
    args = NashMDConfig(max_completion_length=6, mixture_coef=0.5, top_k=1)
    found = write_mixed(model, Reference(), prompts, args, tiny.tokenizer())
    for prompt, answer in zip(prompts, found):
        ids = prompt.ids.tolist()
        for token in answer.ids:
            with torch.no_grad():
                own = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                with model.disable_adapter():
                    base = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert token == int((own + base).argmax())
            ids.append(token)
        assert answer.ended == (answer.ids[-1] == 2)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("online_dpo", {"loss_type": "hinge"}, "one of sigmoid, ipo"),
        ("online_dpo", {"importance_correction": "token_mask"}, "pairs are compared"),
        ("xpo", {"num_generations": 4}, "must be 2: an answer and its opponent's"),
        ("nash_md", {"mixture_coef": 1.2}, r"mixture_coef=1.2 must be in \[0, 1\]"),
        ("xpo", {"rollout_server": "http://localhost:1"}, "leave rollout_server"),
    ],
)
def test_wrong_settings_are_named(tmp_path, name, options, words):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, name, **options)
