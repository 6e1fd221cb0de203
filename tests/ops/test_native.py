"""The C kernels against the torch references, forward and gradient."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from topwork.ops import (
    Layout,
    LinearParts,
    LoraTerm,
    Rule,
    attention,
    lora_linears,
    native,
    rms_norm,
    rotary,
    swiglu,
    token_logprobs,
)
from topwork.ops.attention import tiled_attention
from topwork.ops.dropout import drop
from topwork.ops.native import elementwise
from topwork.ops.native import head as tiled
from topwork.ops.native import lora as thin
from topwork.ops.native.attention import has_amx

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
needs_amx = pytest.mark.skipif(not has_amx(), reason="no bf16 tiles on this machine")


def grads_of(function, tensors):
    """The output and the gradients of `tensors` for a random linear function of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).float().sum(), leaves)]


def close(ours, theirs, tolerance):
    """Relative in the Euclidean norm, and no element far off."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b).norm() <= tolerance * b.norm()
        assert (a.float() - b).abs().max() <= 4 * tolerance * b.abs().max()


CASES = [
    ((7, 33, 128, 1, 300, 31, 32), 6, 2, 64, Rule(0.2)),
    ((290, 70), 9, 3, 64, Rule(0.125, window=50)),
    ((70, 1, 300), 4, 1, 128, Rule(0.1, causal=False)),
    ((70, 300), 2, 1, 96, Rule(0.1, causal=False, window=40)),
    ((700,), 2, 2, 32, Rule(0.3, window=129)),
    ((40, 40), 2, 2, 32, Rule(0.3, chunk=40)),
]


@needs_amx
@pytest.mark.parametrize(("lengths", "heads", "kv", "size", "rule"), CASES)
def test_tiled_attention_equals_the_reference_in_fp32(lengths, heads, kv, size, rule):
    torch.manual_seed(0)
    shapes = [(1, sum(lengths), n, size) for n in (heads, kv, kv)]
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    layout = Layout(lengths)
    ours = grads_of(lambda *t: tiled_attention(*t, layout, rule), tensors)
    wide = [t.float() for t in tensors]
    close(ours, grads_of(lambda *t: attention.reference(*t, layout, rule), wide), 6e-3)


@needs_amx
def test_tiled_attention_of_rows_reads_strided_queries():
    torch.manual_seed(0)
    fused = torch.randn(3, 45, 4 * 32 + 2 * 2 * 32).bfloat16()

    def run(x, op):
        q, k, v = (t.unflatten(-1, (-1, 32)) for t in x.split([128, 64, 64], -1))
        return op(q, k, v, Layout(), Rule(0.2))

    ours = grads_of(lambda x: run(x, tiled_attention), [fused])
    close(ours, grads_of(lambda x: run(x, attention.reference), [fused.float()]), 6e-3)


@needs_amx
def test_tiled_attention_is_deterministic_and_leaves_torch_matmuls_right():
    torch.manual_seed(0)
    tensors = [torch.randn(1, 500, n, 64).bfloat16() for n in (9, 3, 3)]
    x = torch.randn(300, 300).bfloat16()
    product = x @ x
    first = grads_of(lambda *t: tiled_attention(*t, Layout((200, 300)), Rule(0.1)), tensors)
    for _ in range(5):
        again = grads_of(lambda *t: tiled_attention(*t, Layout((200, 300)), Rule(0.1)), tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert torch.equal(x @ x, product)


@needs_amx
def test_nan_in_one_document_stays_there_and_is_not_hidden():
    q, k, v = (torch.randn(1, 64, 2, 32).bfloat16() for _ in range(3))
    k[0, 10] = float("nan")
    out = tiled_attention(q, k, v, Layout((32, 32)), Rule(0.1))[0]
    assert out[10:32].isnan().all()
    assert out[:10].isfinite().all()
    assert out[32:].isfinite().all()


@needs_amx
def test_bf16_attention_takes_the_tiles_and_other_cases_do_not():
    q = torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16)
    tiles = next(v for v in attention.variants if v.name == "tiles")
    assert tiles.when(q, q, q, Layout(), Rule(1.0))
    assert not tiles.when(q, q, q, Layout(), Rule(1.0, softcap=2.0))
    assert not tiles.when(q, q, q, Layout(), Rule(1.0, chunk=2))
    assert not tiles.when(q[:, :1], q, q, Layout(past=3), Rule(1.0))
    assert not tiles.when(q.float(), q.float(), q.float(), Layout(), Rule(1.0))


DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)]


@needs_gcc
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 5, 576), (1, 300, 64)])
def test_kernels_of_a_block_equal_the_references(shape, dtype, tolerance):
    torch.manual_seed(0)
    x, y = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    w = (1 + torch.randn(shape[-1])).to(dtype)
    assert elementwise.serves(x, y, w)
    ours = grads_of(swiglu, [x, y])
    close(ours, grads_of(swiglu.reference, [x.float(), y.float()]), tolerance)
    ours = grads_of(lambda x: rms_norm(x, w, 0.1), [x])
    wide = w.float()
    close(ours, grads_of(lambda x: rms_norm.reference(x, wide, 0.1), [x.float()]), tolerance)


@needs_gcc
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [32, 40])
def test_the_rotary_kernel_equals_the_reference(size, interleaved, dtype, tolerance):
    torch.manual_seed(0)
    angle = torch.rand(2, 7, 16) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = torch.randn(2, 7, 3, size).to(dtype)
    assert elementwise.serves(x, cos, sin)
    ours = grads_of(lambda x: rotary(x, cos, sin, interleaved), [x])
    wide = cos.float(), sin.float(), interleaved
    close(ours, grads_of(lambda x: rotary.reference(x, *wide), [x.float()]), tolerance)


@needs_gcc
@pytest.mark.parametrize("count", [1, 511, 512, 4097, 70001])
def test_the_dropout_kernel_draws_the_mask_of_the_torch_form(count, monkeypatch):
    x, onto = torch.randn(count), torch.randn(count)
    for seed in (0, 7, 2**62 - 1, 0x9E3779B1F0000001):
        kernel, added = drop(x, 0.3, seed), drop(x, 0.3, seed, onto.clone())
        with monkeypatch.context() as patch:
            patch.setattr(elementwise, "serves", lambda *tensors: False)
            torch.testing.assert_close(kernel, drop(x, 0.3, seed), rtol=1e-6, atol=0)
            torch.testing.assert_close(added, drop(x, 0.3, seed, onto.clone()))


@needs_amx
@pytest.mark.parametrize(("count", "words", "size"), [(1, 5, 32), (77, 1333, 96), (40, 4096, 640)])
def test_the_tiled_head_equals_log_softmax(count, words, size):
    torch.manual_seed(0)
    hidden = torch.randn(count, size).bfloat16()
    weight = torch.randn(words, size).bfloat16() / 3
    targets = torch.randint(words, (count,))
    assert tiled.serves(hidden, weight)

    def formula(h):
        return (h @ weight.float().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    ours = grads_of(lambda h: token_logprobs(h, weight, targets), [hidden])
    close(ours[:1], [formula(hidden.float())], 2e-6)
    close(ours, grads_of(formula, [hidden.float()]), 6e-3)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(hidden, weight, targets), ours[0])


@needs_gcc
def test_kernels_pass_nan_on():
    x = torch.randn(3, 64).bfloat16()
    x[1, 3] = float("nan")
    assert swiglu(x.requires_grad_(), x)[1, 3].isnan()
    assert rms_norm(x, torch.ones(64).bfloat16(), 1e-5)[1].isnan().all()
    w = torch.randn(50, 64).bfloat16()
    found = token_logprobs(x, w, torch.tensor([1, 2, 3]))
    assert found.isnan().tolist() == [False, True, False]


@needs_amx
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (8, 1, 33), (64, 40)])
@pytest.mark.parametrize("tokens", [1, 77, 160])
def test_thin_lora_products_equal_the_torch_form(tokens, ranks, rate, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(tokens, 96).bfloat16()
    weights = [torch.randn(n, 96).bfloat16() / 10 for n in (64, 32, 160)]
    matrices = [t for r, w in zip(ranks, weights)
                for t in (torch.randn(r, 96) / 10, torch.randn(len(w), r))]  # fmt: skip

    def run(x, *m):
        parts = [
            LinearParts(w, None, (LoraTerm(a, b, 0.7, rate),))
            for w, a, b in zip(weights, m[0::2], m[1::2])
        ]
        torch.manual_seed(5)
        return torch.cat(lora_linears(x, parts, True), -1)

    assert thin.serves(x, matrices[0].bfloat16())
    ours = grads_of(run, [x, *matrices])
    again = grads_of(run, [x, *matrices])
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    monkeypatch.setattr(thin, "serves", lambda *tensors: False)
    weights = [w.float() for w in weights]
    want = grads_of(run, [x.float(), *matrices])
    close(ours, want, 1.2e-2)


@needs_amx
def test_thin_lora_products_leave_out_the_gradient_of_a_frozen_input():
    x, weight = torch.randn(40, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    before = x.clone()
    lora_linears(x, [LinearParts(weight, None, (LoraTerm(a, b, 1.0),))], True)[0].sum().backward()
    assert torch.equal(x, before)
    assert a.grad is not None
    assert a.grad.abs().sum() > 0


def test_without_a_compiler_torch_computes_and_the_reason_is_told(tmp_path):
    code = (
        "from topwork.ops import native; import torch\n"
        "from topwork.ops import attention, Layout, Rule\n"
        "q = torch.randn(1, 40, 2, 32).bfloat16()\n"
        "assert attention(q, q, q, Layout((20, 20)), Rule(0.1)).isfinite().all()\n"
        "assert not native.available()\n"
        "print(native.why_not())"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    for tool in ("", "#!/bin/sh\necho 'no such flag' >&2; exit 1\n"):
        if tool:
            (tmp_path / "gcc").write_text(tool)
            (tmp_path / "gcc").chmod(0o700)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "no such flag" in done.stdout if tool else "no C compiler" in done.stdout


@needs_gcc
def test_the_kernels_compile():
    assert native.available(), native.why_not()


@needs_gcc
def test_the_library_is_built_once_and_a_damaged_folder_is_no_error(tmp_path):
    code = "from topwork.ops import native; print(native.available(), native.why_not())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                              capture_output=True, check=True)  # fmt: skip
        assert done.stdout.startswith("True")
        built = list((tmp_path / "topwork" / "native").iterdir())
        assert len(built) == 1
    environment["XDG_CACHE_HOME"] = str(built[0])  # a file where a folder should be
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert done.stdout.startswith("False")
