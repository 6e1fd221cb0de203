"""Products with frozen weights on AMX tiles, their low-rank terms and gains, against fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from topwork import ops
from topwork.ops import LinearParts, LoraTerm, lora_linears
from topwork.ops.dora import tiled_row_norms
from topwork.ops.native import linear as tiled
from topwork.ops.native.attention import has_amx

pytestmark = pytest.mark.skipif(not has_amx(), reason="no bf16 tiles on this machine")


def close(ours: Tensor, theirs: Tensor, tolerance: float = 6e-3) -> None:
    """Relative in the Euclidean norm, and no element far off."""
    assert ours.shape == theirs.shape
    assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()
    assert (ours.float() - theirs.float()).abs().max() <= 4 * tolerance * theirs.float().abs().max()


@pytest.mark.parametrize("tokens", [64, 77, 300])
@pytest.mark.parametrize("inner", [(32,), (640, 8), (96, 17, 1344, 672)])
@pytest.mark.parametrize("outputs", [32, 736])
def test_a_sum_of_products_is_one_pass(tokens: int, inner: tuple[int, ...], outputs: int) -> None:
    parts, turned, expected, back = [], [], torch.zeros(tokens, outputs), torch.zeros(())
    for i, k in enumerate(inner):
        rows = torch.randn(tokens, k + 5).bfloat16()[:, 3 : 3 + k]
        weight = (torch.randn(outputs, k) / k**0.5).bfloat16()
        parts.append(tiled.Part(rows, weight.float(), 2.0) if i else tiled.Part(rows, weight))
        turned.append(tiled.Part(rows, weight.t().contiguous()))
        product = rows.float() @ weight.float().t()
        expected, back = expected + product * (2.0 if i else 1.0), back + product
    bias = torch.randn(outputs).bfloat16()
    close(tiled.product(parts, bias), expected + bias.float())
    found = tiled.turned_product(turned)
    close(found, back)
    close(tiled.turned_product(turned, found), 2 * back, 1e-2)


def test_threads_do_not_change_a_product() -> None:
    rows, weight = torch.randn(333, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    once = tiled.product([tiled.Part(rows, weight)])
    assert torch.equal(once, tiled.product([tiled.Part(rows, weight)]))
    assert torch.equal(once[40:200], tiled.product([tiled.Part(rows[40:200], weight)]))


def layers(gains: bool, terms: bool, bias: bool) -> list[LinearParts]:
    torch.manual_seed(0)
    found = []
    for outputs, rank in ((64, 16), (32, 5), (96, 33)):
        own = ()
        if terms and outputs != 32:
            a, b = torch.randn(rank, 160) / 12, torch.randn(outputs, rank) / 4
            own = (LoraTerm(a.requires_grad_(), b.requires_grad_(), 0.5),)
        gain = (torch.rand(outputs) + 0.5).requires_grad_() if gains and own else None
        weight = (torch.randn(outputs, 160) / 12).bfloat16()
        found.append(
            LinearParts(weight, torch.randn(outputs).bfloat16() if bias else None, own, gain)
        )
    return found


def trained(parts: list[LinearParts]) -> list[Tensor]:
    matrices = [m for part in parts for term in part.terms for m in (term.a, term.b)]
    return [*matrices, *(part.gain for part in parts if part.gain is not None)]


def wide(parts: list[LinearParts]) -> list[LinearParts]:
    return [
        LinearParts(p.weight.float(), None if p.bias is None else p.bias.float(), p.terms, p.gain)  # type: ignore[union-attr]
        for p in parts
    ]


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linears_of_one_input_have_the_gradients_of_the_definition(
    gains: bool, terms: bool, bias: bool
) -> None:
    parts = layers(gains, terms, bias)
    found = []
    for x, some, run in (
        (torch.randn(2, 45, 160).bfloat16(), parts, lora_linears),
        (None, wide(parts), lora_linears.reference),
    ):
        x = found[0][0].float() if x is None else x
        leaf = x.detach().requires_grad_()
        outputs = run(leaf, some, True)
        seeds = [torch.Generator().manual_seed(i) for i in range(3)]
        loss = sum(
            (y.float() * torch.randn(y.shape, generator=g)).sum() for y, g in zip(outputs, seeds)
        )
        wanted = [leaf, *trained(some)]
        found.append([x, *outputs, *torch.autograd.grad(loss, wanted)])  # type: ignore[arg-type]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        close(ours, theirs, 1.2e-2)


def test_an_output_that_nothing_reads_has_no_part_in_the_gradients() -> None:
    parts = layers(True, True, False)
    x = torch.randn(90, 160).bfloat16().requires_grad_()
    first, _, _ = lora_linears(x, parts, True)
    grads = torch.autograd.grad(first.float().sum(), [x, *trained(parts)], allow_unused=True)
    alone = torch.autograd.grad(
        lora_linears(x, parts[:1], True)[0].float().sum(), [x, *trained(parts[:1])]
    )
    close(grads[0], alone[0])
    assert torch.equal(grads[1], alone[1])
    assert torch.equal(grads[2], alone[2])
    assert grads[4] is None
    assert torch.equal(grads[5], alone[3])


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_the_norms_of_a_changed_weights_rows_are_those_of_the_sum(rank: int) -> None:
    weight = torch.randn(70, 96).bfloat16()
    a, b = torch.randn(rank, 96), torch.randn(70, rank)
    own = weight.float().square().sum(1)
    whole = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    close(ops.row_norms.reference(weight.float(), a, b, 0.5, own), whole, 1e-5)
    close(tiled_row_norms(weight, a, b, 0.5, own), whole, 3e-3)
