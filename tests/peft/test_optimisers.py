"""Optimisers for LoRA by their formulas."""

from __future__ import annotations

import pytest
import torch
from peft.optimizers import create_riemannian_optimizer as peers_riemannian
from torch import nn

import peft
from topwork.errors import ConfigError
from topwork.peft import (
    LoraConfig,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    get_peft_model,
)

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))


def tuned(library=None, **options):
    config = {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 6, **options}
    torch.manual_seed(1)
    if library is not None:
        return library.get_peft_model(net(), library.LoraConfig(**config))
    return get_peft_model(net(), LoraConfig(**config, init_lora_weights=False))


def gradients(model):
    (model(X) * torch.linspace(-1, 2, 4)).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_lora_fa_trains_b_alone_by_the_nearest_gradient():
    model = tuned(use_rslora=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.1)
    given = gradients(model)
    assert all("lora_B" in name for name in given)
    optimizer.step()
    scale = 6 / 3**0.5
    for name, parameter in model.named_parameters():
        if name not in given:
            assert torch.equal(parameter, before[name])
            continue
        a = before[name.replace("lora_B", "lora_A")]
        wanted = given[name] @ torch.linalg.inv(a @ a.t()) / scale**2
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
        step = wanted / (wanted.abs() + 1e-6)  # the first one of Adam
        torch.testing.assert_close(parameter, before[name] - 0.1 * step, rtol=1e-4, atol=1e-4)


def test_the_riemannian_gradient_does_not_depend_on_how_a_product_is_split():
    moved = []
    for share in (1.0, 10.0):
        model = tuned()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(share if "lora_A" in name else 1 / share if "lora_B" in name else 1)
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.01, reg=1e-9)
        gradients(model)
        optimizer.step()
        moved.append(model(X))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-5)


def test_riemannian_steps_are_the_peers():
    theirs, ours = tuned(peft, init_lora_weights=False), tuned()
    ours.load_state_dict(theirs.state_dict())
    makers = (peers_riemannian, create_riemannian_optimizer)
    for model, make in zip((theirs, ours), makers):
        optimizer = make(model, torch.optim.AdamW, lr=0.05, reg=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            gradients(model)
            optimizer.step()
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


def test_what_the_optimisers_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="no LoRA matrix"):
        create_lorafa_optimizer(net(), lr=0.1)
    with pytest.raises(ConfigError, match="no pair"):
        create_riemannian_optimizer(net(), torch.optim.SGD, lr=0.1)
    optimizer = create_riemannian_optimizer(tuned(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_the_groups_of_lora_plus_are_always_four():
    optimizer = create_loraplus_optimizer(tuned(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4)
    groups = optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [2, 0, 2, 0]
    assert [group["lr"] for group in groups] == [0.1, 1e-6, 0.4, 0.4]
