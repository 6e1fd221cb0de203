"""Bottleneck adapters, which peft lacks: the formula, files, training, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import topwork
from parity.bases import IDS, base, close, our_base, randomise
from topwork.errors import ConfigError
from topwork.peft import PeftModel, get_peft_model


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh"])
def test_it_computes_its_formula(parallel, act):
    net = nn.Sequential(nn.Linear(6, 8))
    config = topwork.BottleneckConfig(
        target_modules=["0"], reduction_factor=4, is_parallel=parallel, non_linearity=act,
        scaling=0.7,
    )  # fmt: skip
    model = get_peft_model(net, config)
    x, plain = torch.randn(3, 6), net[0].base_layer
    close(model(x), plain(x))  # nothing is added at the start
    randomise(model)
    state = {k.rpartition("0.")[2]: v for k, v in model.adapter_state().items()}
    y = plain(x)
    inner = (x if parallel else y) @ state["bottleneck_down.weight"].t()
    inner = topwork.peft.methods.bottleneck.ACTIVATIONS[act](inner + state["bottleneck_down.bias"])
    added = inner @ state["bottleneck_up.weight"].t() + state["bottleneck_up.bias"]
    assert state["bottleneck_up.weight"].shape == (8, 2)
    close(model(x), y + 0.7 * added)


def test_it_trains_saves_and_is_not_merged(tmp_path):
    ours = get_peft_model(our_base("qwen2", tmp_path), topwork.BottleneckConfig(reduction_factor=4))
    names = {n.split(".")[-3] for n, p in ours.named_parameters() if p.requires_grad}
    assert names == {"bottleneck_down", "bottleneck_up"}
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = ours.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    ours.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base("qwen2"), tmp_path / "adapter")
    with torch.no_grad():
        close(again(IDS).logits, ours(IDS).logits, rtol=1e-4)
    with pytest.raises(ConfigError, match="not linear"):
        ours.merge_and_unload()
    with pytest.raises(ConfigError, match="nearest: 'relu'"):
        topwork.BottleneckConfig(non_linearity="relo")
