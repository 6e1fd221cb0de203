"""Weights of 4 and 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from topwork.errors import ConfigError
from topwork.quant import QuantisedLinear, quantise
from topwork.quant.tiles import BENDS, NORMAL, bent


def linear(outputs=48, inputs=128, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.006), ("int4", 0.075), ("nf4", 0.1)])
def test_the_weight_comes_back_near_what_went_in(kind, worst):
    one = linear()
    made = QuantisedLinear.of(one, kind)
    error = (made.dequantised_weight() - one.weight).norm() / one.weight.norm()
    assert 0 < error < worst
    assert torch.equal(made.bias, one.bias)


def short(x):
    return x.to(torch.bfloat16).float()


def test_values_on_the_levels_come_back_exactly():
    torch.manual_seed(1)
    scale = short(torch.rand(48, 4, 1) + 0.5)
    codes = torch.randint(0, 16, (48, 4, 32))
    codes[..., 0] = 0  # the far end, which settles the scale
    one = linear()
    with torch.no_grad():
        one.weight.copy_((torch.tensor(NORMAL)[codes] * scale).flatten(1))
    made = QuantisedLinear.of(one, "nf4")
    torch.testing.assert_close(made.dequantised_weight(), one.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bend", BENDS)
def test_int4_takes_the_levels_that_a_weight_lies_on(bend):
    torch.manual_seed(1)
    scale, base = short(torch.rand(2, 48, 4, 1) + 0.5)
    codes = torch.randint(0, 16, (48, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    one = linear()
    with torch.no_grad():
        one.weight.copy_((bent(bend)[codes] * scale + base).flatten(1))
    made = QuantisedLinear.of(one, "int4")
    torch.testing.assert_close(made.held["levels"], bent(bend))
    # The base is rounded once more where it is formed from the ends.
    assert (made.dequantised_weight() - one.weight).abs().max() < 0.01


def test_the_search_for_scales_and_bases_beats_the_ends_of_the_groups():
    torch.manual_seed(2)
    one = linear(64, 256)
    with torch.no_grad():
        one.weight.normal_()
    made = QuantisedLinear.of(one, "int4")
    groups = one.weight.view(64, 8, 32)
    least = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - least) / 15
    plain = (((groups - least) / step).round() * step + least).flatten(1)
    error = [(w - one.weight).norm() for w in (made.dequantised_weight(), plain)]
    assert error[0] < 0.87 * error[1]
    assert torch.equal(made.held["levels"], bent(BENDS[1]))


def test_groups_without_spread_come_back():
    one = linear()
    with torch.no_grad():
        one.weight.view(48, 4, 32)[:, 1] = 0
        one.weight.view(48, 4, 32)[:, 2] = 0.5
    made = QuantisedLinear.of(one, "int4").dequantised_weight().view(48, 4, 32)
    assert (made[:, 1] == 0).all()
    assert (made[:, 2] == 0.5).all()


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
    for kind, share in (("int8", 0.51), ("int4", 0.32)):
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
