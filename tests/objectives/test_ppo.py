from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import tiny
from topwork import LoraConfig, PeftModel, PPOConfig, PPOTrainer, TrainerCallback
from topwork.errors import CheckpointError, ConfigError
from topwork.models import AutoModelForSequenceClassification, Config
from topwork.objectives import critic, kept
from topwork.objectives.policy import Spread, whitened
from topwork.objectives.ppo import Estimated
from topwork.training.distributed import World

ROWS = [{"prompt": f"go {i}", "top": 100} for i in range(6)]
LORA = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}


def share(completion_ids, top, **_):
    """The share of an answer's tokens below its row's `top`."""
    return [sum(i < x for i in ids) / len(ids) for ids, x in zip(completion_ids, top)]


def classifier(seed=1):
    torch.manual_seed(seed)
    config = Config(**{**tiny.model().config.to_dict(), "num_labels": 1})
    return AutoModelForSequenceClassification.from_config(config)


def trainer(folder, reward=share, rows=ROWS, callbacks=(), value_model=None, **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 2,
        "max_completion_length": 8, "learning_rate": 2e-2, "logging_steps": 1, "max_steps": 3,
        "disable_tqdm": True, "save_strategy": "no", "num_ppo_epochs": 1, "vf_coef": 0.5,
    }  # fmt: skip
    torch.manual_seed(2)
    return PPOTrainer(
        tiny.model(), reward, PPOConfig(**{**values, **options}), rows,
        processing_class=tiny.tokenizer(), callbacks=callbacks, value_model=value_model,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def means(run, name):
    return [e[name] for e in run.state.log_history if name in e]


# -- formulas --------------------------------------------------------------------------------------


def test_advantages_are_the_discounted_sum_of_surprises():
    torch.manual_seed(0)
    owners = torch.tensor([0, 0, 0, 0, 2, 3, 3])  # the answer 1 has no trained token
    rewards, values = torch.randn(7), torch.randn(7)
    found = critic.advantages(rewards, values, Spread(owners, 4), gamma=0.9, lam=0.7)
    for own in ([0, 1, 2, 3], [4], [5, 6]):
        after = [*values[own][1:].tolist(), 0.0]
        gaps = [float(r) + 0.9 * n - float(v) for r, n, v in zip(rewards[own], after, values[own])]
        for t, at in enumerate(own):
            wanted = sum((0.9 * 0.7) ** (k - t) * gaps[k] for k in range(t, len(own)))
            assert float(found[at]) == pytest.approx(wanted, abs=1e-5)


def test_with_lambda_one_the_returns_are_what_is_left_to_earn():
    owners = torch.tensor([0, 0, 0, 1, 1])
    rewards, values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.randn(5)
    found = critic.advantages(rewards, values, Spread(owners, 2), 1.0, 1.0) + values
    torch.testing.assert_close(found, torch.tensor([6.0, 5.0, 3.0, 9.0, 5.0]))


def test_a_score_goes_to_the_last_token_of_its_answer():
    spread = Spread(torch.tensor([0, 0, 2, 2, 2]), 3)
    found = critic.with_score(torch.full((5,), -1.0), torch.tensor([10.0, 20.0, 30.0]), spread)
    assert found.tolist() == [-1, 9, -1, -1, 29]


def test_the_clipped_value_loss_is_the_worse_one():
    new, old, returns = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.0, 0.9, 0.0]), torch.ones(3)
    found, held = critic.value_losses(new, old, returns, clip=0.5)
    # moved onto the target: held back at 0.5; moved within the clip; moved past it: its own error
    torch.testing.assert_close(found, torch.tensor([0.125, 0.0, 2.0]))
    assert held.tolist() == [True, False, False]


def test_whitening_is_over_all_parts_together():
    torch.manual_seed(0)
    parts = [torch.randn(3) * 2 + 1, torch.randn(5)]
    whole = torch.cat(parts)
    centred = (whole - whole.mean()) / whole.std()
    torch.testing.assert_close(torch.cat(whitened(parts, World())), centred)
    torch.testing.assert_close(
        torch.cat(whitened(parts, World(), centre=False)), centred + whole.mean()
    )


# -- the objective ---------------------------------------------------------------------------------


def plain(model, prompt, answer, head):
    """Log-probabilities and values of an answer's tokens, from whole logits of one text."""
    ids = torch.tensor([[*prompt, *answer]])
    hidden = model.backbone(ids)[0, len(prompt) - 1 : -1]
    logprobs = model.head(hidden).log_softmax(-1)
    targets = torch.tensor(answer)[:, None]
    return logprobs.gather(1, targets)[:, 0], hidden @ head.weight[0] + head.bias


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_loss_is_that_of_the_paper(tmp_path, estimator):
    run = trainer(tmp_path, kl_coef=0.2, gamma=0.9, lam=0.8, kl_estimator=estimator,
                  missing_eos_penalty=2.0, importance_correction="none")  # fmt: skip
    run._prepare()
    policy, head, args = run.policy, run.model.critic, run.args
    torch.manual_seed(4)
    with torch.no_grad():
        head.weight.normal_(std=0.5)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (batch,) = run.objective.assemble(run.model, [run.train_data[:2]], World())
    flat = batch.batch.input_ids[0].tolist()
    texts, at = [], 0
    for prompt, *sizes in batch.batch.lengths:
        start, at = flat[at : at + prompt], at + prompt
        for size in sizes:
            texts.append((start, flat[at : at + size]))
            at += size
    advantages, olds, values, returns = [], [], [], []
    with torch.no_grad():
        for prompt, answer in texts:
            old, value = plain(policy, prompt, answer, head)
            with policy.disable_adapter():
                ref, _ = plain(policy, prompt, answer, head)
            gap = old - ref
            kl = gap if estimator == "k1" else (-gap).exp() + gap - 1
            rewards = -0.2 * kl
            rewards[-1] += sum(i < 100 for i in answer) / len(answer)
            rewards[-1] -= 0.0 if answer[-1] == 2 else 2.0
            behind, found = 0.0, []
            for t in reversed(range(len(answer))):
                after = value[t + 1] if t + 1 < len(answer) else 0.0
                behind = rewards[t] + 0.9 * after - value[t] + 0.9 * 0.8 * behind
                found.insert(0, behind)
            advantages.append(torch.stack(found))
            olds.append(old)
            values.append(value)
            returns.append(advantages[-1] + value)
    whole = torch.cat(advantages)
    advantage = (whole - whole.mean()) / whole.std()
    old, value, wanted = torch.cat(olds), torch.cat(values), torch.cat(returns)
    torch.testing.assert_close(batch.advantages, advantage, rtol=1e-4, atol=1e-5)

    with torch.no_grad():  # a policy that has moved, so that both clips act
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        head.weight.add_(torch.randn_like(head.weight) * 0.1)
    pairs = [plain(policy, p, a, head) for p, a in texts]
    ratio = (torch.cat([n for n, _ in pairs]) - old).exp()
    new = torch.cat([v for _, v in pairs])
    gains = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    bounded = torch.min(torch.max(new, value - 0.2), value + 0.2)
    misses = torch.max((new - wanted) ** 2, (bounded - wanted) ** 2)
    assert ((ratio - 1).abs() > 0.2).any()
    assert ((new - value).abs() > 0.2).any()
    theirs = -gains.mean() + 0.5 * 0.5 * misses.mean()
    tensors = [p for p in run.model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(theirs, tensors)
    ours = run.objective.loss(run.model, batch).over(run.objective.weight(batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, slope in zip(torch.autograd.grad(ours, tensors), slopes):
        torch.testing.assert_close(mine, slope, rtol=2e-3, atol=2e-5)
    assert args.missing_eos_penalty == 2.0


@pytest.mark.parametrize("own", [False, True], ids=["shared trunk", "critic of its own"])
def test_training_raises_the_reward(tmp_path, own):
    run = trainer(
        tmp_path, rows=ROWS[::2], value_model=classifier() if own else None, num_generations=8,
        per_device_train_batch_size=24, max_steps=60, num_ppo_epochs=2, learning_rate=3e-2,
        lr_scheduler_type="constant", kl_coef=0.0,
    )  # fmt: skip
    run.train()
    rewards = means(run, "reward")
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.1
    misses = means(run, "value_loss")
    assert sum(misses[-6:]) < 0.7 * sum(misses[:6])
    kept_lines = (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]
    assert len(json.loads(kept_lines[0])["completions"]) == 8
    assert len(kept_lines) == 30


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def test_the_cut_of_a_step_changes_no_gradient(tmp_path):
    whole, parts = Note(), Note()
    options = {"max_steps": 1, "shuffle": False, "max_grad_norm": 0, "rows": ROWS[:4],
               "whiten_rewards": True}  # fmt: skip
    trainer(tmp_path, per_device_train_batch_size=8, callbacks=[whole], **options).train()
    trainer(tmp_path, gradient_accumulation_steps=2, callbacks=[parts], **options).train()
    for one, other in zip(whole.grads[0], parts.grads[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_a_draw_lasts_for_its_passes_and_mini_batches(tmp_path):
    calls = []

    def count(completions, **_):
        calls.append(len(completions))
        return [0.5] * len(completions)

    seen = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, **more):
            seen.append(more["trainer"].objective.kept[0])

    run = trainer(tmp_path, count, num_ppo_epochs=2, gradient_accumulation_steps=2,
                  num_mini_batches=2, max_steps=8, callbacks=[Look()])  # fmt: skip
    run.train()
    assert calls == [8, 4]  # 6 rows of two answers: one whole step, then what is left
    assert seen == [0] * 4 + [1] * 4


def test_a_run_cut_within_a_draw_goes_on_bitwise(tmp_path):
    options = {"num_ppo_epochs": 3, "max_steps": 6, "gradient_accumulation_steps": 2}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        trainer(tmp_path / "cut", callbacks=[Stop()], **options).train()
    second = trainer(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    for name in ("loss", "reward", "value_loss", "grad_norm"):
        assert means(second, name) == means(whole, name)
    for (name, one), other in zip(second.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(one, other), name


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    run = trainer(tmp_path, num_ppo_epochs=2)
    run._prepare()
    found = run.objective.assemble(run.model, [run.train_data[:2]], World())
    rounds, back = kept.unpacked(kept.packed(3, found), Estimated)
    assert rounds == 3
    for name, value in vars(found[0].batch).items():
        other = getattr(back[0].batch, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert torch.equal(found[0].advantages, back[0].advantages)
    assert found[0].metrics == back[0].metrics


@pytest.mark.parametrize("own", [False, True], ids=["shared trunk", "critic of its own"])
def test_the_policy_is_saved_as_usual_and_the_critic_below_it(tmp_path, own):
    run = trainer(tmp_path, max_steps=1, value_model=classifier() if own else None)
    run.train()
    run.save_model()
    ids = torch.tensor([[5, 6, 7]])
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, run.policy(ids).logits)
    if own:
        again = PeftModel.from_pretrained(classifier(), tmp_path / "critic").eval()
        torch.testing.assert_close(again(ids).logits, run.model.critic(ids).logits)
        return
    head = load_file(tmp_path / "critic" / "value_head.safetensors")
    assert head["weight"].abs().sum() > 0
    taken = trainer(tmp_path / "on", value_model=tmp_path / "critic").model.critic
    assert torch.equal(taken.weight, head["weight"])
    torch.manual_seed(0)
    with pytest.raises(CheckpointError, match=r"weight is \[1, 16\].*want \[1, 32\]"):
        PPOTrainer(
            tiny.model(hidden_size=32), share, PPOConfig(output_dir=str(tmp_path)), ROWS,
            processing_class=tiny.tokenizer(), value_model=tmp_path / "critic",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": 1.5}, r"lam=1.5 must be in \[0, 1\]"),
        ({"kl_estimator": "k2"}, "one of k1, k3"),
        ({"num_mini_batches": 2}, "must divide gradient_accumulation_steps=1"),
        ({"cliprange_value": 0.0}, "cliprange_value=0.0 must be above 0"),
        ({"per_device_train_batch_size": 3}, "multiple of num_generations=2"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, **options)


def test_a_critic_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a sequence classifier of topwork's with one label"):
        trainer(tmp_path, value_model=tiny.model(seed=3))
