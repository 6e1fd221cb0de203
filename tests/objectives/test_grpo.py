from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch

import tiny
from topwork import (
    GRPOConfig,
    GRPOTrainer,
    LoraConfig,
    RLOOConfig,
    RLOOTrainer,
    TrainerCallback,
)
from topwork.errors import ConfigError, TrainingError
from topwork.objectives import policy
from topwork.objectives.policy import PolicyLoss, Spread

ROWS = [{"prompt": f"go {i}", "top": 100} for i in range(6)]


def share(completion_ids, top, **_):
    """The share of an answer's tokens below its row's `top`."""
    return [sum(i < x for i in ids) / len(ids) for ids, x in zip(completion_ids, top)]


def trainer(folder, reward=share, rows=ROWS, kind=GRPOTrainer, config=GRPOConfig, callbacks=(),
            model=None, **options):  # fmt: skip
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 4,
        "per_device_eval_batch_size": 4, "max_completion_length": 8, "learning_rate": 2e-2,
        "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "max_steps": 3,
    }  # fmt: skip
    torch.manual_seed(2)
    return kind(
        tiny.model() if model is None else model, reward, config(**{**values, **options}), rows,
        processing_class=tiny.tokenizer(), callbacks=callbacks,
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip


def means(run, name):
    return [e[name] for e in run.state.log_history if name in e]


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_training_raises_the_reward(tmp_path, kind, config):
    run = trainer(tmp_path, rows=ROWS[::2], kind=kind, config=config, num_generations=8,
                  per_device_train_batch_size=24, max_steps=40, beta=0.0,
                  lr_scheduler_type="constant", learning_rate=4e-2)  # fmt: skip
    run.train()
    rewards = means(run, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    names = ("reward_std", "frac_reward_zero_std", "completions/mean_length", "rewards/share/mean")
    assert set(names) <= set(run.state.log_history[0])
    kept = [
        json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]
    ]
    assert len(kept) == 40
    assert len(kept[0]["completions"]) == 8


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


@pytest.mark.parametrize(
    "own",
    [
        {"loss_type": "grpo"}, {"loss_type": "dapo"}, {"loss_type": "dr_grpo"},
        {"loss_type": "gmpo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "top_k": 20,
         "importance_correction": "sequence_mask", "importance_correction_min": 0.05},
        {"loss_type": "vespo", "top_k": 20, "temperature": 0.8, "beta": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_the_cut_of_a_step_changes_neither_loss_nor_gradients(tmp_path, own):
    whole, parts = Note(), Note()
    options = {**own, "max_steps": 1, "shuffle": False, "max_grad_norm": 0,
               "rows": ROWS[:2]}  # fmt: skip
    trainer(tmp_path, per_device_train_batch_size=8, callbacks=[whole], **options).train()
    trainer(tmp_path, gradient_accumulation_steps=2, callbacks=[parts], **options).train()
    for one, other in zip(whole.grads[0], parts.grads[0]):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_answers_are_kept_for_several_iterations(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            seen.append(id(more["trainer"].objective.kept[1]))

    run = trainer(tmp_path, num_iterations=2, max_steps=4, callbacks=[Look()])
    run.train()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert means(run, "loss")[1] != 0


def test_groups_that_teach_nothing_are_drawn_again(tmp_path):
    calls = []

    def flat_at_first(completions, **_):
        calls.append(len(completions))
        return [1.0] * len(completions) if len(calls) == 1 else list(range(len(completions)))

    trainer(tmp_path, reward=flat_at_first, max_resamples=3, max_steps=1).train()
    assert calls == [4, 4]


def test_truncated_answers_can_be_left_out(tmp_path):
    run = trainer(tmp_path, mask_truncated_completions=True)
    run._prepare()
    (batch,) = run.objective.assemble(run.model, [[run.train_data[0]]])
    ended = sum(t == 2 for t in batch.batch.targets.tolist())
    assert len(set(batch.batch.owners.tolist())) == ended


def failing(kind):
    def reward(completions, **_):
        if kind == "raise":
            raise KeyError("gold")
        return {"nan": [math.nan] * 4, "short": [1.0]}[kind]

    return reward


@pytest.mark.parametrize(
    ("kind", "words"),
    [("raise", "reward failed: KeyError"), ("nan", "returned nan for the completion"),
     ("short", "returned 1 rewards for 4")],
)  # fmt: skip
def test_a_reward_that_fails_stops_with_its_name_after_saving(tmp_path, kind, words):
    run = trainer(tmp_path, reward=failing(kind))
    with pytest.raises(TrainingError, match=rf"{words}.*saved as .*checkpoint-0"):
        run.train()
    assert (tmp_path / "checkpoint-0" / "manifest.json").is_file()


def test_none_means_not_judged_and_async_functions_are_awaited(tmp_path):
    async def late(completions, **_):
        return [None if i == 0 else float(i) for i in range(len(completions))]

    run = trainer(tmp_path, reward=[late, share], reward_weights=[1.0, 0.5], max_steps=1)
    run.train()
    assert means(run, "rewards/late/mean") == [2.0]


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"share wants \['top'\]"):
        trainer(tmp_path, rows=[{"prompt": "a"}]).train()


def test_a_stop_waits_for_the_step_and_a_resumed_run_goes_on(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **more):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        trainer(tmp_path / "cut", gradient_accumulation_steps=2, callbacks=[Stop()]).train()
    second = trainer(tmp_path / "cut", gradient_accumulation_steps=2)
    second.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", gradient_accumulation_steps=2)
    whole.train()
    assert means(second, "reward") == means(whole, "reward")
    assert means(second, "loss") == means(whole, "loss")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_device_train_batch_size": 6}, "multiple of num_generations=4"),
        ({"loss_type": "grop"}, "nearest: 'grpo'"),
        ({"num_generations": 1}, "at least 2"),
        ({"temperature": 0.0}, "must be positive"),
        ({"importance_correction": "token_trunc"}, "nearest: 'token_truncate'"),
        ({"importance_correction": "sequence_mask", "loss_type": "vespo"}, "vespo weighs whole"),
        ({"loss_type": "gmpo", "delta": 2.0}, "leave delta and importance_sampling_level out"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward_weights for 1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, **options).train()


def test_the_reward_model_scores_prompt_and_answer(tmp_path):
    from topwork.models import AutoModelForSequenceClassification, Config

    torch.manual_seed(0)
    config = Config(**{**tiny.model().config.to_dict(), "num_labels": 1})
    judge = AutoModelForSequenceClassification.from_config(config)
    torch.manual_seed(2)
    run = GRPOTrainer(
        tiny.model(), judge,
        GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4,
                   max_completion_length=4, max_steps=1, logging_steps=1, disable_tqdm=True),
        ROWS, processing_class=tiny.tokenizer(), reward_processing_classes=tiny.tokenizer(),
    )  # fmt: skip
    run.train()
    assert math.isfinite(means(run, "reward")[0])


# -- sampler and trainer -----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engine_tells_the_chances_that_the_trainer_finds(tmp_path, temperature):
    run = trainer(tmp_path, temperature=temperature, max_steps=1)
    run._prepare()
    (batch,) = run.objective.assemble(run.model, [[run.train_data[0]]])
    assert batch.sampled.isfinite().all()
    logprobs = run.objective._logprobs(run.model, batch)
    torch.testing.assert_close(batch.sampled, logprobs.detach(), rtol=1e-4, atol=1e-4)


def test_a_sampler_that_is_cut_short_is_corrected_and_told(tmp_path):
    run = trainer(tmp_path, top_k=5, max_steps=1)
    run.train()
    ratio = means(run, "sampling/ratio")[0]
    assert 0 < ratio < 0.9  # the best five hold only a part of what the policy would say
    assert means(run, "sampling/truncated_fraction") == [0.0]
    masked = trainer(tmp_path, top_k=5, max_steps=1, importance_correction="token_mask",
                     importance_correction_min=0.5)  # fmt: skip
    masked.train()
    assert 0 < means(masked, "sampling/masked_fraction")[0] <= 1


def test_the_ratio_of_the_policies_is_bounded():
    spread = Spread(torch.tensor([0, 0, 1]), 2)
    old = torch.tensor([-1.0, -2.0, -3.0])
    sampled = torch.tensor([-3.0, -1.0, float("nan")])  # e², 1/e, not told
    e = math.e
    for mode, wanted, beyond in (
        ("token_truncate", [3.0, 0.5, 1.0], [True, True, False]),
        ("token_mask", [0.0, 0.0, 1.0], [True, True, False]),
        ("sequence_truncate", [e, e, 1.0], [False, False, False]),
        ("sequence_mask", [e, e, 1.0], [False, False, False]),
    ):
        weights, held = policy.Correction(mode, 0.5, 3.0).weights(old, sampled, spread)
        torch.testing.assert_close(weights, torch.tensor(wanted))
        assert held.tolist() == beyond
    weights, held = policy.Correction("sequence_mask", None, 2.0).weights(old, sampled, spread)
    assert weights.tolist() == [0.0, 0.0, 1.0]
    assert policy.Correction("token_mask", None, None).weights(old, sampled, spread)[1].sum() == 0


def test_answers_that_do_not_end_lose_their_penalty(tmp_path):
    run = trainer(tmp_path, missing_eos_penalty=3.0, max_steps=1, max_completion_length=2)
    run.train()
    cut = means(run, "completions/clipped_ratio")[0]
    assert cut > 0
    assert means(run, "rewards/missing_eos/mean")[0] == pytest.approx(-3 * cut)
    assert means(run, "reward")[0] == pytest.approx(means(run, "rewards/share/mean")[0] - 3 * cut)


# -- formulas --------------------------------------------------------------------------------------


def test_advantages_follow_their_formulas():
    torch.manual_seed(0)
    rewards = torch.randn(3, 4, 2)
    weights = torch.tensor([1.0, 0.5])
    summed = (rewards * weights).sum(-1)
    gap = summed - summed.mean(1, keepdim=True)
    for scale, deviation in (
        ("group", summed.std(1, keepdim=True) + 1e-4), ("batch", summed.std() + 1e-4), ("none", 1),
    ):  # fmt: skip
        torch.testing.assert_close(
            policy.group_advantages(rewards, weights, scale), gap / deviation
        )
    others = torch.stack([(summed.sum(1) - summed[:, i]) / 3 for i in range(4)], 1)
    torch.testing.assert_close(policy.leave_one_out(summed), summed - others)
    rewards[0, 1] = float("nan")
    found = policy.group_advantages(rewards, weights)
    assert found[0, 1] == 0
    known = summed[0, [0, 2, 3]]
    torch.testing.assert_close(found[0, [0, 2, 3]], (known - known.mean()) / (known.std() + 1e-4))


def test_the_k3_estimate_and_the_sequence_ratio():
    owners = torch.tensor([0, 0, 1])
    spread = Spread(owners, 2)
    new, old = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.25])
    level = policy.log_ratio(new, old, spread, "sequence")
    torch.testing.assert_close(level, torch.tensor([-0.25, -0.25, -0.25]))
    gap = old - new
    torch.testing.assert_close(policy.kl_k3(new, old), gap.exp() - gap - 1)
    assert (policy.kl_k3(new, old) >= 0).all()


def test_on_policy_every_clipped_loss_has_the_gradient_of_reinforce():
    owners, advantage = torch.tensor([0, 0, 1]), torch.tensor([1.5, -2.0])
    spread = Spread(owners, 2)
    for kind in ("grpo", "dapo", "sapo", "cispo", "vespo"):
        new = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        loss = PolicyLoss(kind, epsilon_high=5.0 if kind == "cispo" else None)
        policy.token_losses(new, new.detach(), advantage, spread, loss).sum().backward()
        torch.testing.assert_close(new.grad, -advantage[owners], rtol=1e-5, atol=1e-6)


def test_gmpo_clips_each_ratio_before_their_geometric_mean():
    """Against the paper's formula, ratio by ratio."""
    ratios = torch.tensor([0.5, 1.0, 2.0, 0.4, 1.9])
    owners, advantages = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.5, -2.0])
    loss = PolicyLoss("gmpo", epsilon=0.4, epsilon_high=0.3)
    found = policy.token_losses(ratios.log(), torch.zeros(5), advantages, Spread(owners, 2), loss)
    first = (0.5 * 1.0 * math.exp(0.3)) ** (1 / 3)  # a high ratio of a good answer is held
    second = (math.exp(-0.4) * 1.9) ** (1 / 2)  # a low one of a bad answer
    torch.testing.assert_close(found, torch.tensor([-1.5 * first] * 3 + [2.0 * second] * 2))
    shares = policy.clipped_shares(ratios, advantages[owners], loss)
    assert shares["clip_ratio/high_mean"].tolist() == [0, 0, 1, 0, 0]
    assert shares["clip_ratio/low_mean"].tolist() == [0, 0, 0, 1, 0]
