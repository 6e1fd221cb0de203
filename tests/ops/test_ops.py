from __future__ import annotations

import pytest
import torch

from topwork.ops import LinearParts, LoraTerm, lora_linears, rms_norm, rotary, swiglu
from topwork.ops.attention import (
    Layout,
    Rule,
    ScoreTerms,
    attention,
    document_attention,
    fused_attention,
)
from topwork.ops.dropout import drop
from topwork.ops.logprobs import token_logprobs, token_logprobs_of


def grads_of(function, tensors, weight_seed=0):
    """The output and the gradients of `tensors` for a random linear function of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(weight_seed)
    total = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outs)
    return [*outs, *torch.autograd.grad(total, leaves)]


def same(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def lora_case():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    weights = [torch.randn(4, 6), torch.randn(7, 6)]
    bias = torch.randn(4)
    matrices = [torch.randn(3, 6), torch.randn(4, 3), torch.randn(2, 6), torch.randn(7, 2),
                torch.randn(1, 6), torch.randn(7, 1)]  # fmt: skip

    def parts(a0, b0, a1, b1, a2, b2, rate=0.0):
        return (
            LinearParts(weights[0], bias, (LoraTerm(a0, b0, 0.5, rate),)),
            LinearParts(
                weights[1], None, (LoraTerm(a1, b1, 2.0, rate), LoraTerm(a2, b2, -1.0, rate))
            ),
        )

    return x, matrices, parts


def test_fused_lora_equals_the_formula_in_outputs_and_gradients():
    x, matrices, parts = lora_case()
    ours = grads_of(lambda x, *m: lora_linears(x, parts(*m), True), [x, *matrices])
    theirs = grads_of(lambda x, *m: lora_linears.reference(x, parts(*m), True), [x, *matrices])
    same(ours, theirs)


def test_lora_dropout_uses_one_mask_forward_and_backward():
    x, matrices, parts = lora_case()
    torch.manual_seed(3)
    ours = grads_of(lambda x, *m: lora_linears(x, parts(*m, rate=0.4), True), [x, *matrices])
    torch.manual_seed(3)
    seed = int(torch.randint(0, 2**62, ()).item())
    mask = drop(torch.ones(10, 6), 0.4, seed).view(2, 5, 6)

    def formula(x, *m):
        base = lora_linears.reference(x, [LinearParts(p.weight, p.bias) for p in parts(*m)], True)
        low = lora_linears.reference(x * mask, parts(*m), True)
        plain = lora_linears.reference(
            x * mask, [LinearParts(p.weight, p.bias) for p in parts(*m)], True
        )
        return tuple(b + a - p for b, a, p in zip(base, low, plain))

    same(ours, grads_of(formula, [x, *matrices]), 1e-4)


def test_an_unused_output_gives_zero_gradients_to_its_term():
    x, matrices, parts = lora_case()
    leaves = [m.clone().requires_grad_() for m in matrices]
    out = lora_linears(x.requires_grad_(), parts(*leaves), True)[0].sum()
    out.backward()
    assert leaves[0].grad.abs().sum() > 0
    assert leaves[2].grad.abs().sum() == 0
    assert x.grad.isfinite().all()


def test_dropout_zeroes_the_asked_share_and_keeps_the_mean():
    y = drop(torch.ones(400, 500), 0.05, 7)
    assert abs((y == 0).float().mean().item() - 0.05) < 2e-3
    assert abs(y.mean().item() - 1) < 2e-3
    assert torch.equal(y, drop(torch.ones(400, 500), 0.05, 7))
    assert not torch.equal(y, drop(torch.ones(400, 500), 0.05, 8))


def test_frozen_rms_norm_equals_the_formula():
    torch.manual_seed(0)
    x, w = torch.randn(3, 8), torch.randn(8)
    same(
        grads_of(lambda x: rms_norm(x, w, 0.1), [x]),
        grads_of(lambda x: w * x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt(), [x]),
    )


def test_swiglu_and_rotary_equal_their_formulas():
    torch.manual_seed(0)
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    same(grads_of(swiglu, [a, b]), grads_of(lambda a, b: a * a.sigmoid() * b, [a, b]))
    x = torch.randn(1, 4, 2, 6)
    angle = torch.randn(1, 4, 3)

    def turned(x):
        z = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(1), angle)[:, :, None]
        return torch.cat((z.real, z.imag), -1)

    same(grads_of(lambda x: rotary(x, angle.cos(), angle.sin()), [x]), grads_of(turned, [x]))


def test_interleaved_rotary_turns_neighbours_and_a_part_leaves_the_rest():
    torch.manual_seed(0)
    x, angle = torch.randn(2, 4, 3, 10), torch.randn(2, 4, 3)

    def turned(x):
        z = torch.complex(x[..., 0:6:2], x[..., 1:6:2]) * torch.exp(1j * angle)[:, :, None]
        return torch.cat((torch.view_as_real(z).flatten(-2), x[..., 6:]), -1)

    same(
        grads_of(lambda x: rotary(x, angle.cos(), angle.sin(), True), [x]),
        grads_of(turned, [x]),
    )
    halves = rotary(x, angle.cos(), angle.sin())
    torch.testing.assert_close(halves[..., :6], rotary(x[..., :6], angle.cos(), angle.sin()))
    assert torch.equal(halves[..., 6:], x[..., 6:])


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("lengths", [(12,), (3, 3, 6), (1, 7, 4)])
def test_attention_per_document_equals_the_masked_reference(lengths, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 12, 6, 4), torch.randn(1, 12, 2, 4), torch.randn(1, 12, 2, 4)
    layout = Layout(lengths)
    same(
        grads_of(lambda *t: document_attention(*t, layout, Rule(0.3, window=window)), [q, k, v]),
        grads_of(lambda *t: attention.reference(*t, layout, Rule(0.3, window=window)), [q, k, v]),
    )


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("past", "padded"), [(0, False), (0, True), (5, False), (5, True)])
def test_fused_attention_equals_the_reference(past, padded, window):
    torch.manual_seed(0)
    q = torch.randn(2, 3, 4, 4)
    k, v = torch.randn(2, 3 + past, 2, 4), torch.randn(2, 3 + past, 2, 4)
    keep = torch.ones(2, 3 + past, dtype=torch.bool)
    keep[1, :2] = False
    layout = Layout(None, past, keep if padded else None)
    same(
        grads_of(lambda *t: fused_attention(*t, layout, Rule(0.5, window=window)), [q, k, v]),
        grads_of(lambda *t: attention.reference(*t, layout, Rule(0.5, window=window)), [q, k, v]),
    )


@pytest.mark.parametrize("count", [0, 1, 130, 300])
def test_token_logprobs_equal_log_softmax(count):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(count, 8), torch.randn(33, 8), torch.randint(33, (count,))

    def formula(h):
        return (h @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    wanted = grads_of(formula, [hidden])
    same(grads_of(lambda h: token_logprobs(h, weight, targets), [hidden]), wanted)
    if count:
        same(grads_of(lambda h: token_logprobs_of(lambda r: r @ weight.t(), h, targets), [hidden]),
             wanted)  # fmt: skip


def test_token_logprobs_of_a_trainable_head_give_its_gradient():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 8), torch.randn(33, 8), torch.randint(33, (9,))
    same(
        grads_of(lambda h, w: token_logprobs(h, w, targets), [hidden, weight]),
        grads_of(
            lambda h, w: (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0],
            [hidden, weight],
        ),
    )


RULES = [
    (Rule(0.4, causal=False), ScoreTerms()),
    (Rule(0.4, causal=False, window=3), ScoreTerms()),
    (Rule(0.4, chunk=4), ScoreTerms()),
    (Rule(0.4, softcap=2.0, window=3), ScoreTerms()),
    (Rule(0.4), ScoreTerms(slopes=torch.tensor([0.5, 0.25, 0.1, 0.7]))),
    (Rule(0.4, window=4), ScoreTerms(bias=torch.randn(4, 12, 12))),
    (Rule(0.4), ScoreTerms(sinks=torch.randn(4))),
]


@pytest.mark.parametrize(("rule", "terms"), RULES)
def test_every_rule_holds_in_packed_padded_and_cached_rows(rule, terms):
    torch.manual_seed(0)
    sizes = (7, 3, 9)
    q, k, v = torch.randn(1, 19, 4, 6), torch.randn(1, 19, 2, 6), torch.randn(1, 19, 2, 5)
    alone = [
        attention.reference(*(t[:, at : at + n] for t in (q, k, v)), Layout(), rule, terms)
        for at, n in ((0, 7), (7, 3), (10, 9))
    ]
    packed = torch.cat(alone, 1)
    torch.testing.assert_close(attention(q, k, v, Layout(sizes), rule, terms), packed)
    torch.testing.assert_close(attention.reference(q, k, v, Layout(sizes), rule, terms), packed)
    keep = torch.zeros(1, 12, dtype=torch.bool)
    keep[:, 3:] = True
    long = [torch.cat((torch.randn_like(t[:, :3]), t[:, 10:19]), 1) for t in (q, k, v)]
    for run in (attention, attention.reference):
        padded = run(*long, Layout(keep=keep), rule, terms)
        torch.testing.assert_close(padded[:, 3:], alone[2])
        last = run(long[0][:, 11:], *long[1:], Layout(past=11, keep=keep), rule, terms)
        torch.testing.assert_close(last, alone[2][:, 8:])
    both = [t[:, 10:19] for t in (q, k, v)]
    for run in (attention, attention.reference):
        end = run(both[0][:, 6:], *both[1:], Layout(past=6), rule, terms)
        torch.testing.assert_close(end, alone[2][:, 6:])


@pytest.mark.parametrize(("rule", "terms"), RULES)
def test_every_rule_has_the_gradients_of_the_reference(rule, terms):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 10, 4, 6), torch.randn(1, 10, 2, 6), torch.randn(1, 10, 2, 6)]
    layout = Layout((6, 4))
    same(
        grads_of(lambda *t: attention(*t, layout, rule, terms), tensors),
        grads_of(lambda *t: attention.reference(*t, layout, rule, terms), tensors),
    )
