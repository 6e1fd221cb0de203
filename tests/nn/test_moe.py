"""Experts and routers against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from topwork import ops
from topwork.errors import ConfigError
from topwork.nn.moe import (
    ExpertsSpec,
    GroupedRouter,
    MoeSpec,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
    router_logits,
)


def moe(router, **fields):
    torch.manual_seed(0)
    built = MoeSpec(ExpertsSpec(6, 10), router, **fields).build(8)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return built


def one_by_one(built, x, weights, chosen, weigh_input=False):
    """Every token through each of its experts, alone."""
    y = torch.zeros_like(x)
    for n in range(len(x)):
        for share, expert in zip(weights[n], chosen[n]):
            seen = x[n] * share if weigh_input else x[n]
            gate, up = (built.experts.gate_up_proj[expert] @ seen).chunk(2)
            out = built.experts.down_proj[expert] @ (F.silu(gate) * up)
            y[n] += out if weigh_input else share * out
    return y


@pytest.mark.parametrize("router", [SoftmaxRouter(2), TopKSoftmaxRouter(3), SigmoidRouter(1)])
@pytest.mark.parametrize("weigh_input", [False, True])
def test_a_token_gets_the_weighted_sum_of_its_experts(router, weigh_input):
    built = moe(router, weigh_input=weigh_input)
    x = torch.randn(2, 5, 8)
    weights, chosen = router.choose(built.gate(x.flatten(0, 1)), None)
    wanted = one_by_one(built, x.flatten(0, 1), weights, chosen, weigh_input)
    torch.testing.assert_close(built(x).flatten(0, 1), wanted, rtol=1e-5, atol=1e-6)


def test_normalised_probabilities_are_the_softmax_over_the_chosen():
    logits = torch.randn(7, 6)
    for found, wanted in zip(
        SoftmaxRouter(3).choose(logits, None), TopKSoftmaxRouter(3).choose(logits, None)
    ):
        torch.testing.assert_close(found, wanted)


def test_grouped_choice_follows_the_correction_and_the_weights_do_not():
    router = GroupedRouter(2, groups=3, kept=1, normalised=False, scale=2.0)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    weights, chosen = router.choose(logits, torch.zeros(6))
    assert sorted(chosen[0].tolist()) == [0, 1]  # the group with the best sum of two
    weights, chosen = router.choose(logits, torch.tensor([0, 0, 0, 0, 5.0, 5.0]))
    assert sorted(chosen[0].tolist()) == [4, 5]
    torch.testing.assert_close(weights, 2 * logits.sigmoid().gather(1, chosen))


def test_an_expert_that_nobody_chose_gets_no_gradient():
    built = moe(SoftmaxRouter(1))
    with torch.no_grad():
        built.gate.weight.copy_(torch.eye(6, 8) * 9)
    x = torch.eye(8)[None, [0, 0, 2]].requires_grad_()
    built(x).sum().backward()
    used = built.experts.down_proj.grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_linear_gives_each_group_its_weight(bias):
    x, weight = torch.randn(7, 4), torch.randn(3, 4, 5)
    b = torch.randn(3, 5) if bias else None
    found = ops.grouped_linear(x, weight, [3, 0, 4], b)
    owners = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    wanted = torch.einsum("mi,mio->mo", x, weight[owners]) + (0 if b is None else b[owners])
    torch.testing.assert_close(found, wanted)
    assert ops.grouped_linear(x[:0], weight, [0, 0, 0]).shape == (0, 5)


def test_balanced_routing_costs_the_number_of_choices():
    even = torch.eye(4) * 50  # each token sure of an expert of its own
    assert ops.load_balancing_loss([even], 1).item() == pytest.approx(1.0)
    all_one = torch.tensor([[50.0, 0, 0, 0]]).expand(4, 4)
    assert ops.load_balancing_loss([all_one], 1).item() == pytest.approx(4.0)


def test_router_logits_are_noted_within_the_block_alone():
    built = moe(SoftmaxRouter(2))
    with router_logits(built) as found:
        built(torch.randn(1, 3, 8))
    built(torch.randn(1, 3, 8))
    assert [logits.shape for logits in found] == [(3, 6)]


@pytest.mark.parametrize(
    ("router", "words"),
    [
        (SoftmaxRouter(7), "from 1 to the 6 experts"),
        (SoftmaxRouter(0), "num_experts_per_tok=0"),
        (GroupedRouter(3, 3, 1, True, 1.0), "from 1 to the 2 experts"),
        (GroupedRouter(1, 6, 1, True, 1.0), "a group needs two experts"),
    ],
)
def test_a_router_that_cannot_choose_so_many_is_refused(router, words):
    with pytest.raises(ConfigError, match=words):
        moe(router)
