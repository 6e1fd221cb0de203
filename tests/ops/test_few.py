"""Linears of a few rows: right to the last bits, each row as it is alone, where they fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from topwork import ops
from topwork.ops.native import few

pytestmark = pytest.mark.skipif(few._kernel() is None, reason="no AVX-512 with bf16")
SIZES = [(256, 256), (320, 208), (333, 301), (1000, 96)]  # in, out; also no whole registers


def ran(x, *parts):
    """The name of the variant that would run."""
    return next((v.name for v in ops.lora_linears.variants if v.when(x, parts)), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 11, 16])
@pytest.mark.parametrize(("width", "out"), SIZES)
def test_products_are_those_of_float64(dtype, rows, width, out):
    torch.manual_seed(rows)
    x = torch.randn(rows, 1, width, dtype=dtype)
    pairs = [(torch.randn(n, width, dtype=dtype), torch.randn(n, dtype=dtype)) for n in (out, 80)]
    pairs.append((pairs[0][0], None))
    tiny = torch.finfo(dtype).eps
    for y, (w, b) in zip(few.linears(x, pairs), pairs, strict=True):
        assert y.shape == (rows, 1, len(w))
        assert y.dtype is dtype
        exact = F.linear(x.double(), w.double(), None if b is None else b.double())
        scale = x.double().abs() @ w.double().abs().t()
        allowed = tiny * exact.abs() + width**0.5 * 2**-23 * scale
        assert ((y - exact).abs() <= allowed).all()


def test_a_row_is_the_same_whatever_rows_are_beside_it():
    x, w = torch.randn(16, 333), torch.randn(301, 333)
    (whole,) = few.linears(x, [(w, None)])
    for rows in (1, 3, 5, 8, 9):
        assert torch.equal(few.linears(x[:rows], [(w, None)])[0], whole[:rows])


def test_two_threads_give_what_one_does():
    x, w = torch.randn(5, 256), torch.randn(301, 256)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(few.linears(x, [(w, None)])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_it_runs_where_there_are_few_rows_large_weights_and_no_gradient():
    part = ops.LinearParts(torch.randn(256, 256), torch.randn(256))
    x = torch.randn(2, 8, 256)
    assert ran(x, part) == "few rows"
    assert ran(torch.randn(17, 256), part) is None
    assert ran(x.bfloat16(), part) is None  # another type than the weight's
    assert ran(x, part, ops.LinearParts(torch.randn(8, 256), None)) is None  # a small weight
    assert ran(x, ops.LinearParts(torch.randn(256, 512)[:, ::2], None)) is None
    learned = ops.LinearParts(nn.Parameter(torch.randn(256, 256)), None)
    assert ran(x, learned) is None
    with torch.no_grad():
        assert ran(x, learned) == "few rows"
        with torch.autocast("cpu", torch.bfloat16):
            assert ran(x, learned) is None
    untiled = ops.LinearParts(torch.randn(301, 333).bfloat16(), None)
    assert ran(torch.randn(4, 333).bfloat16(), untiled) == "few rows"
    assert ran(torch.randn(5, 333).bfloat16(), untiled) is None


def test_a_few_rows_are_normed_in_one_pass():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 1, 333), torch.randn(333)
    for dtype, allowed in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        given = x.to(dtype), weight.to(dtype), 1e-6
        chosen = next(v for v in ops.rms_norm.variants if v.when(*given))
        assert chosen.name == "few rows"
        wanted = ops.rms_norm.reference(*given)
        torch.testing.assert_close(chosen.run(*given), wanted, rtol=allowed, atol=allowed)
    learned = nn.Parameter(weight)
    assert not any(v.when(x, learned, 1e-6) for v in ops.rms_norm.variants)
    assert not any(v.when(torch.randn(200, 333), weight, 1e-6) for v in ops.rms_norm.variants)
