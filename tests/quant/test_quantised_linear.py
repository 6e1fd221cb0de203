"""Weights of 4 and 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from topwork.errors import ConfigError
from topwork.quant import QuantisedLinear, quantise
from topwork.quant.tiles import EVEN, NORMAL


def linear(outputs=48, inputs=128, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.006), ("int4", 0.1), ("nf4", 0.1)])
def test_the_weight_comes_back_near_what_went_in(kind, worst):
    one = linear()
    made = QuantisedLinear.of(one, kind)
    error = (made.dequantised_weight() - one.weight).norm() / one.weight.norm()
    assert 0 < error < worst
    assert torch.equal(made.bias, one.bias)


@pytest.mark.parametrize(("kind", "levels"), [("int4", EVEN), ("nf4", NORMAL)])
def test_values_on_the_levels_come_back_exactly(kind, levels):
    torch.manual_seed(1)
    scale = torch.rand(48, 4, 1).to(torch.bfloat16).float() + 0.5
    scale = scale.to(torch.bfloat16).float()
    codes = torch.randint(0, 16, (48, 4, 32))
    codes[..., 0] = 0  # the far end, which settles the scale
    one = linear()
    with torch.no_grad():
        one.weight.copy_((torch.tensor(levels)[codes] * scale).flatten(1))
    made = QuantisedLinear.of(one, kind)
    torch.testing.assert_close(made.dequantised_weight(), one.weight, rtol=1e-6, atol=1e-6)


def test_the_search_for_scales_beats_the_largest_value():
    torch.manual_seed(2)
    one = linear(64, 256)
    with torch.no_grad():
        one.weight.normal_()
    made = QuantisedLinear.of(one, "int4")
    groups = one.weight.view(64, 8, 32)
    far = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    plain = ((groups / far).round().clamp(-8, 7) * far).flatten(1)
    error = [(w - one.weight).norm() for w in (made.dequantised_weight(), plain)]
    assert error[0] < 0.97 * error[1]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gradients_flow_through_and_nothing_large_is_kept(kind):
    made = QuantisedLinear.of(linear(), kind)
    x = torch.randn(3, 128, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = made(x)
    y.backward(torch.ones_like(y))
    assert all(t.numel() < 48 * 128 for t in kept)
    torch.testing.assert_close(x.grad, made.dequantised_weight().sum(0).expand(3, -1))


def test_memory_is_a_quarter_and_less():
    one = linear(512, 512).to(torch.bfloat16)
    for kind, share in (("int8", 0.51), ("int4", 0.29)):
        made = QuantisedLinear.of(one, kind)
        held = sum(b.nbytes for b in made.buffers())
        assert held < share * one.weight.nbytes, kind


def test_quantise_replaces_what_fits_and_leaves_the_rest():
    model = nn.ModuleDict(
        {"a": linear(), "odd": linear(30, 50), "skipped": linear(), "lm_head": linear(64, 64)}
    )
    quantise(model, "int4", skip=lambda path: path == "skipped")
    assert model["a"].kind == "int4"
    assert model["lm_head"].kind == "int8"
    assert type(model["odd"]) is nn.Linear
    assert type(model["skipped"]) is nn.Linear


def test_wrong_kinds_and_shapes_are_named():
    with pytest.raises(ConfigError, match="nearest: 'int4'"):
        QuantisedLinear.of(linear(), "int44")
    with pytest.raises(ConfigError, match=r"\[30, 50\] cannot"):
        QuantisedLinear.of(linear(30, 50), "int8")
    with pytest.raises(ConfigError, match="group=48"):
        QuantisedLinear.of(linear(), "int4", group=48)
