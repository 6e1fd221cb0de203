"""Our policy losses against TRL's own on the same off-policy batches, with gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset

import tiny
from topwork import GRPOConfig
from topwork.data.groups import Group, collate_groups
from topwork.data.prepare import Sample
from topwork.objectives import policy
from topwork.objectives.draws import Rollout
from topwork.objectives.grpo import GRPO
from topwork.objectives.logprobs import token_logprobs
from topwork.objectives.policy import PolicyLoss, Spread
from topwork.training.distributed import World
from topwork.training.objective import total_units

PROMPT, SIZES = 5, (4, 7, 2, 6)
ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, -1.1])


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", use_vllm=False,
        gradient_checkpointing=False, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=9,
    )  # fmt: skip
    made = trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder), lambda completions, **_: [0.0],
        args, Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )  # fmt: skip
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)

    def ids(size):
        return rng.integers(3, 250, size).astype(np.int32)

    answers = tuple(Sample(0, ids(n), np.ones(n, bool)) for n in SIZES)
    group = Group(0, ids(PROMPT), answers)
    torch.manual_seed(5)
    drift, apart = (torch.randn(sum(SIZES)) * s for s in (0.3, 0.5))
    return group, drift, apart


CORRECTIONS = [m for m in policy.CORRECTIONS if m != "none"]
CASES = [
    {"loss_type": kind, "level": level, "beta": beta}
    for kind in policy.AGGREGATION
    for level in policy.LEVELS
    for beta in (0.0, 0.3)
    if kind not in ("vespo", "gmpo") or level == "token"
] + [{"loss_type": "dapo", "delta": 1.1}, {"loss_type": "grpo", "epsilon_high": 0.05}]


CORRECTED = [
    {"loss_type": kind, "beta": 0.3, "correction": mode}
    for kind in ("dapo", "grpo", "vespo")
    for mode in CORRECTIONS
    if kind != "vespo" or mode.startswith("token")
]


@pytest.mark.parametrize("case", [*CASES, *CORRECTED], ids=str)
def test_each_loss_equals_the_peer(peer, batch, case):
    group, drift, apart = batch
    case = dict(case)
    mode = case.pop("correction", None)
    model = tiny.model()
    packed = collate_groups([group])
    spread = Spread(packed.owners, len(SIZES))
    loss = PolicyLoss(**case, bias_correction=case["loss_type"] != "gmpo")
    new = token_logprobs(model, packed)
    old, ref = new.detach() + drift, new.detach() + apart
    correction = None
    if mode is not None:
        bounds = policy.Correction(mode, 0.6, 1.3)
        correction, beyond = bounds.weights(old, old + drift.flip(0), spread)
        assert 0 < beyond.sum() < len(beyond)
    losses = policy.token_losses(new, old, ADVANTAGES, spread, loss, ref, correction)
    divisor = policy.units(loss.loss_type, len(SIZES), sum(SIZES), 9)
    ours = policy.total(losses, spread, loss.loss_type) / divisor
    ours.backward()

    peer.loss_type, peer.beta = loss.loss_type, loss.beta
    peer.importance_sampling_level = loss.level
    peer.epsilon_low, peer.epsilon_high, peer.args.delta = loss.epsilon, loss.high, loss.delta
    width = max(SIZES)
    rows, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    padded = {"old": torch.zeros(4, width), "ref": torch.zeros(4, width)}
    weights = torch.ones(4, width)
    at = 0
    for i, answer in enumerate(group.answers):
        n = len(answer)
        rows[i, :n], mask[i, :n] = torch.from_numpy(answer.ids).long(), 1
        padded["old"][i, :n], padded["ref"][i, :n] = old[at : at + n], ref[at : at + n]
        if correction is not None:
            weights[i, :n] = correction[at : at + n]
        at += n
    prompt = torch.from_numpy(group.prompt).long().expand(4, PROMPT)
    peer.model.zero_grad()
    peer.use_vllm = mode is not None
    peer.vllm_importance_sampling_correction = True
    from trl.experimental.gmpo import GMPOTrainer

    kind = GMPOTrainer if loss.loss_type == "gmpo" else trl.GRPOTrainer
    theirs = kind._compute_loss(
        peer,
        peer.model,
        {
            "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": rows,
            "completion_mask": mask, "advantages": ADVANTAGES, "old_per_token_logps": padded["old"],
            "ref_per_token_logps": padded["ref"], "num_items_in_batch": mask.sum(),
            "importance_sampling_ratio": weights,
        },
    )  # fmt: skip
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, parameter in peer.model.named_parameters():
        mine = model.get_parameter(name).grad
        assert (mine - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-7, name


HELD = [
    {"top_entropy_quantile": 0.4},
    {"top_entropy_quantile": 0.4, "beta": 0.3, "loss_type": "grpo"},
    {"off_policy_mask_threshold": 0.05},
    {"off_policy_mask_threshold": 0.05, "top_entropy_quantile": 0.6, "loss_type": "cispo"},
    {"entropy_coef": 0.7},
    {"entropy_coef": 0.7, "top_entropy_quantile": 0.4, "loss_type": "dr_grpo"},
]


@pytest.mark.parametrize("case", HELD, ids=str)
def test_what_is_masked_and_spread_out_equals_the_peer(peer, batch, case):
    """Uncertain tokens alone, answers left behind, and an entropy bonus, with gradients."""
    group, drift, apart = batch
    case = {"loss_type": "dapo", "beta": 0.0, **case}
    args = GRPOConfig(
        num_generations=4, max_completion_length=9, importance_correction="none", **case
    )  # fmt: skip
    model, objective = tiny.model(), GRPO(args, None)  # type: ignore[arg-type]
    rollout = Rollout(collate_groups([group]), ADVANTAGES)
    if args.top_entropy_quantile < 1:
        objective._heed(model, [rollout], World())
        share = rollout.heeded.float().mean()
        assert share == pytest.approx(args.top_entropy_quantile, abs=0.06)
    now = token_logprobs(model, rollout.batch).detach()
    rollout.old, rollout.ref = now + drift, now + apart
    loss = objective.loss(model, rollout).over(total_units([objective.weight(rollout)]))
    loss.backward()

    peer.loss_type, peer.beta, peer.importance_sampling_level = (
        case["loss_type"],
        args.beta,
        "token",
    )
    peer.epsilon_low, peer.epsilon_high, peer.args.delta = 0.2, 0.2, None
    peer.use_vllm = False
    peer.top_entropy_quantile = args.top_entropy_quantile
    peer.off_policy_mask_threshold = args.off_policy_mask_threshold
    peer.entropy_coef, peer._entropy_bonus_enabled = args.entropy_coef, bool(args.entropy_coef)
    width, at = max(SIZES), 0
    rows, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    padded = {"old": torch.zeros(4, width), "ref": torch.zeros(4, width)}
    for i, answer in enumerate(group.answers):
        n = len(answer)
        rows[i, :n], mask[i, :n] = torch.from_numpy(answer.ids).long(), 1
        padded["old"][i, :n] = rollout.old[at : at + n]
        padded["ref"][i, :n] = rollout.ref[at : at + n]
        at += n
    prompt = torch.from_numpy(group.prompt).long().expand(4, PROMPT)
    peer.model.zero_grad()
    wanted = peer._compute_loss(
        peer.model,
        {
            "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": rows,
            "completion_mask": mask, "advantages": ADVANTAGES, "old_per_token_logps": padded["old"],
            "ref_per_token_logps": padded["ref"], "num_items_in_batch": mask.sum(),
        },
    )  # fmt: skip
    wanted.backward()
    peer.top_entropy_quantile, peer.off_policy_mask_threshold = 1.0, None
    peer._entropy_bonus_enabled = False
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for name, parameter in peer.model.named_parameters():
        mine = model.get_parameter(name).grad
        assert (mine - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-7, name
