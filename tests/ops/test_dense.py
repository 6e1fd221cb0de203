"""fp32 linears as sums of two bf16 numbers: close to exact, and only where they are asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from topwork import ops
from topwork.ops.dense import dense_linears, linear_gelu
from topwork.ops.native.attention import has_amx

needs_tiles = pytest.mark.skipif(not has_amx(), reason="no bf16 tiles")


def ran(x, part):
    """The names of the variant that would run."""
    return next((v.name for v in ops.lora_linears.variants if v.when(x, (part,))), None)


@needs_tiles
@pytest.mark.parametrize("sizes", [(64, 32, 32), (97, 384, 96), (700, 96, 160), (65, 1536, 384)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_right_to_sixteen_bits(sizes, biased):
    rows, width, out = sizes
    torch.manual_seed(0)
    x, w = torch.randn(rows, width), torch.randn(out, width)
    x[0] *= 1e4
    part = ops.LinearParts(w, torch.randn(out) if biased else None)
    wanted = F.linear(x.double(), w.double(), None if part.bias is None else part.bias.double())
    (found,) = dense_linears(x, (part,))
    scale = x.double().abs() @ w.double().abs().t()
    assert ((found - wanted).abs() / scale).max() < 2**-17
    with ops.sums_of_two():
        bent = linear_gelu(x, part)
    assert ((bent - F.gelu(wanted)).abs() / (1 + scale)).max() < 2**-17


@needs_tiles
def test_it_runs_only_where_it_is_asked_for_and_fits():
    x, part = torch.randn(2, 64, 64), ops.LinearParts(torch.randn(32, 64), None)
    assert ran(x, part) is None
    with ops.sums_of_two():
        assert ran(x, part) == "sums of two"
        assert ran(x[:, :16], part) is None  # too few rows
        assert ran(x[..., :48], ops.LinearParts(torch.randn(32, 48), None)) is None
        assert ran(x.bfloat16(), part) is None
        grad = ops.LinearParts(torch.randn(32, 64, requires_grad=True), None)
        assert ran(x, grad) is None
        with torch.no_grad():
            assert ran(x, grad) == "sums of two"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert ran(x, part) == "sums of two"
    finally:
        torch.set_float32_matmul_precision(before)


@needs_tiles
def test_numbers_that_are_none_stay_so():
    x, w = torch.randn(64, 32), torch.randn(32, 32)
    x[3, 4], x[5, 6] = float("nan"), float("inf")
    (found,) = dense_linears(x, (ops.LinearParts(w, None),))
    assert not found[[3, 5]].isfinite().any()
    assert found[[0, 1, 2, 4]].isfinite().all()
