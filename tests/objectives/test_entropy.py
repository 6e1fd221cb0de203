"""Which tokens of an answer move the policy: uncertain ones, near ones; and a bonus for entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from topwork import GRPOConfig, GRPOTrainer, LoraConfig, RLOOConfig, SDPOConfig
from topwork.data.groups import Group, collate_groups
from topwork.data.prepare import Sample
from topwork.errors import ConfigError
from topwork.objectives.draws import Rollout
from topwork.objectives.grpo import GRPO
from topwork.objectives.logprobs import score
from topwork.training.distributed import World
from topwork.training.objective import total_units

USUAL = {"num_generations": 2, "max_completion_length": 9, "importance_correction": "none",
         "temperature": 0.8}  # fmt: skip


def group(seed, *sizes):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 250, n).astype(np.int32) for n in (5, *sizes)]
    return Group(seed, ids[0], tuple(Sample(seed, i, np.ones(len(i), bool)) for i in ids[1:]))


GROUPS = [group(0, 4, 7), group(1, 2, 6)]
ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, -1.1])


def rollouts(cut):
    """Both groups in one micro-batch, or each in one of its own."""
    if not cut:
        return [Rollout(collate_groups(GROUPS), ADVANTAGES)]
    return [Rollout(collate_groups([g]), a) for g, a in zip(GROUPS, ADVANTAGES.split(2))]


def plain(model, batch):
    """log p [N, V] at temperature 0.8, and the targets."""
    hidden = model.backbone(batch.input_ids, lengths=batch.lengths)[0, batch.positions]
    return (model.head(hidden).float() / 0.8).log_softmax(-1)


def test_the_bonus_is_the_mean_entropy_of_the_policy_with_its_gradient():
    (one,) = rollouts(cut=False)
    found = []
    for weight in (0.0, 0.7):
        model = tiny.model()
        objective = GRPO(GRPOConfig(**USUAL, entropy_coef=weight), None)
        loss = objective.loss(model, one).over(total_units([objective.weight(one)]))
        if not weight:
            said = plain(model, one.batch)
            loss = loss + 0.7 * (said.exp() * said).sum(-1).mean()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"entropy_coef": 0.5}])
def test_the_cut_of_a_step_changes_neither_the_tokens_nor_the_loss(more):
    model = tiny.model()
    objective = GRPO(GRPOConfig(**USUAL, top_entropy_quantile=0.3, **more), None)
    found = []
    for cut in (False, True):
        parts = rollouts(cut)
        objective._heed(model, parts, World())
        units = total_units([objective.weight(p) for p in parts])
        loss = sum(objective.loss(model, p).over(units) for p in parts)
        found.append((loss.detach(), torch.cat([p.heeded for p in parts])))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    with torch.no_grad():
        said = plain(model, rollouts(cut=False)[0].batch)
    entropy = -(said.exp() * said).sum(-1)
    assert torch.equal(found[0][1], entropy >= np.quantile(entropy.numpy(), 0.7))
    assert int(found[0][1].sum()) in (6, 7)  # of 19; answers to one prompt begin alike


def test_bad_answers_are_left_out_once_the_policy_is_far_from_them():
    """Good ones stay; what the sampler did not tell is taken from the old policy."""
    model, (one,) = tiny.model(), rollouts(cut=False)
    with torch.no_grad():
        now = score(model, one.batch, temperature=0.8).logprobs
    one.old = now.clone()
    far = torch.tensor([1.0, 1.0, 1.0, 0.0])[one.batch.owners]
    one.sampled = torch.where(one.batch.owners == 1, torch.nan, now + far)
    args = GRPOConfig(**{**USUAL, "off_policy_mask_threshold": 0.5})
    found = GRPO(args, None).compared(one, now)
    assert found.metrics["off_policy_masked_fraction"][0] == 0
    one.old = now + (one.batch.owners == 1)
    found = GRPO(args, None).compared(one, now)
    assert found.metrics["off_policy_masked_fraction"] == (7, 19)


def test_a_checkpoint_between_passes_holds_which_tokens_are_trained(tmp_path):
    def run(home, **more):
        torch.manual_seed(0)
        args = GRPOConfig(
            output_dir=str(home), num_generations=2, per_device_train_batch_size=4, max_steps=4,
            max_completion_length=6, num_iterations=2, top_entropy_quantile=0.5, entropy_coef=0.1,
            off_policy_mask_threshold=0.1, disable_tqdm=True, logging_steps=1, learning_rate=0.01,
            **{"save_strategy": "no", **more},
        )  # fmt: skip
        return GRPOTrainer(
            tiny.model(), lambda completion_ids, **_: [float(sum(i)) for i in completion_ids], args,
            [{"prompt": f"ask {i}"} for i in range(4)], processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(r=2),
        )  # fmt: skip

    whole = run(tmp_path / "a")
    whole.train()
    assert whole.state.log_history[0]["entropy"] > 1
    run(tmp_path / "b", save_strategy="steps", save_steps=1).train()
    late = run(tmp_path / "c")
    late.train(resume_from_checkpoint=tmp_path / "b" / "checkpoint-1")
    for (name, a), (_, b) in zip(whole.model.named_parameters(), late.model.named_parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("kind", "values", "error"),
    [
        (GRPOConfig, {"top_entropy_quantile": 0.0}, "must be in"),
        (GRPOConfig, {"entropy_coef": -1.0}, "at least 0"),
        (GRPOConfig, {"use_adaptive_entropy": True}, "stays as it is"),
        (RLOOConfig, {"top_entropy_quantile": 0.5}, "is not read by RLOO"),
        (RLOOConfig, {"loss_type": "grpo"}, "is not read by RLOO"),
        (SDPOConfig, {"entropy_coef": 0.5}, "is not read by SDPO"),
    ],
)
def test_what_has_no_meaning_is_refused(kind, values, error):
    with pytest.raises(ConfigError, match=error):
        kind(**values)
