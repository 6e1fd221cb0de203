"""The best few of a vocabulary are those of a sort."""

from __future__ import annotations

import pytest
import torch

from topwork import ops
from topwork.ops.native.build import available

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler")


@pytest.mark.parametrize("shape", [(1, 5), (3, 257), (4, 50_265), (5, 512)])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("rising", [True, False])
def test_values_and_ids_are_those_of_the_reference(shape, normalise, rising):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape)
    if rising:  # every stretch has a better one than all before it
        logits = logits.sort(-1).values
    count = min(24, shape[1])
    wanted = ops.likeliest.reference(logits, count, normalise)
    found = ops.likeliest(logits, count, normalise)
    assert torch.equal(found[1], wanted[1])
    assert torch.allclose(found[0], wanted[0], atol=1e-5, rtol=1e-6)


def test_the_first_of_equal_ones_comes_first():
    logits = torch.zeros(2, 1000)
    logits[0, [400, 7, 900]] = 1.0
    assert ops.likeliest(logits, 5)[1].tolist() == [[7, 400, 900, 0, 1], [0, 1, 2, 3, 4]]


def test_barred_tokens_stay_barred_and_what_is_no_number_is_told():
    logits = torch.full((3, 600), float("-inf"))
    logits[0, 599] = 2.0
    logits[1, [3, 500]] = torch.tensor([1.0, 2.0])
    logits[2] = torch.randn(600)
    logits[2, 300] = float("nan")
    values, ids = ops.likeliest(logits, 2)
    assert ids[:2].tolist() == [[599, 0], [500, 3]]
    assert values[0].tolist() == [0.0, float("-inf")]
    assert values[2].isnan().all()


def test_the_reference_runs_where_the_kernel_does_not_serve():
    logits = torch.randn(2, 700, requires_grad=True)
    assert ops.likeliest(logits, 3)[0].requires_grad
    assert ops.likeliest(logits.detach().double(), 3)[0].dtype is torch.float64
    assert ops.likeliest(logits.detach()[:, ::2], 300)[0].shape == (2, 300)
