"""Every method on quantised bases: what it computes on the same weights in full."""

from __future__ import annotations

import copy

import pytest
import torch

import topwork
from parity.bases import IDS, close, randomise
from parity.test_methods import FIRST, of_tasks, our_config
from topwork import get_peft_model, quant
from topwork.quant import Blocks, QuantisedLinear, Rows
from topwork.quant.config import linears_of

# KaSA takes directions out of the weight, which rounds it anew.
ROWS = [row for row in FIRST if "kasa_config" not in row.options]
FORMS = {"nf4": Blocks("nf4", double=True), "int8": Rows()}


def base(form):
    torch.manual_seed(0)
    config = topwork.Config(
        model_type="qwen2", vocab_size=37, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = topwork.AutoModelForCausalLM.from_config(config)
    for path, linear in list(linears_of(model, model.trunk)):
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, QuantisedLinear.of(linear, FORMS[form]))
    return model


def found(model):
    logits = model(IDS, **of_tasks(model)).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_it_computes_as_on_the_same_weights_in_full(row, form):
    packed = base(form)
    whole = copy.deepcopy(packed)
    quant.dequantise(whole)
    models = [get_peft_model(m, our_config(row)).eval() for m in (packed, whole)]
    for module in models[0].modules():  # in training int8 rounds no activations
        if isinstance(module, QuantisedLinear):
            module.train()
    randomise(models[0])
    with torch.no_grad():
        for key, tensor in models[1].adapter_state().items():
            tensor.copy_(models[0].adapter_state()[key])
    (first, grads), (second, wanted) = (found(model) for model in models)
    assert not torch.allclose(first, packed_alone(form), atol=1e-3)
    loose = {"rtol": 1e-4, "atol": 1e-4}
    close(first, second, **loose)
    for name, grad in grads.items():
        if wanted[name] is not None:
            scale = 1 + float(wanted[name].abs().max())
            close(grad / scale, wanted[name] / scale, **loose, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def packed_alone(form):
    return base(form)(IDS).logits
