"""Activation checkpointing of our own: the same gradients, less kept, and no compiler imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.ops import LinearParts, LoraTerm, lora, lora_linear
from topwork.ops.recompute import Carried, recomputed


def inner(x: Tensor, layer: nn.Module) -> Tensor:
    return F.dropout(torch.tanh(layer(x)), 0.3).exp()


def test_gradients_are_those_of_the_plain_run_dropout_included() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    found = []
    for run in (inner, lambda *args: recomputed(inner, *args)):
        torch.manual_seed(3)
        layer.zero_grad()
        seen = x.clone().requires_grad_()
        run(seen, layer).sum().backward()
        found.append([seen.grad, *(p.grad for p in layer.parameters())])
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)


def test_a_run_within_a_run_gives_the_same_gradients() -> None:
    layer, x = nn.Linear(5, 5), torch.randn(3, 5)

    def nested(x: Tensor, layer: nn.Module) -> Tensor:
        return recomputed(inner, torch.sin(recomputed(inner, x, layer)), layer)

    def plain(x: Tensor, layer: nn.Module) -> Tensor:
        return inner(torch.sin(inner(x, layer)), layer)

    found = []
    for run in (lambda x: recomputed(nested, x, layer), lambda x: plain(x, layer)):
        torch.manual_seed(0)
        layer.zero_grad()
        run(x).sum().backward()
        found.append(layer.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.equal(*found)


def test_the_graph_serves_two_backward_passes() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    y = recomputed(inner, x, layer).sum()
    y.backward(retain_graph=True)
    once = layer.weight.grad.clone()  # type: ignore[union-attr]
    y.backward()
    assert torch.equal(layer.weight.grad, 2 * once)  # type: ignore[arg-type]


def test_the_generator_goes_on_as_if_nothing_was_run_again() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    torch.manual_seed(0)
    recomputed(inner, x, layer).sum().backward()
    after = torch.rand(())
    torch.manual_seed(0)
    inner(x, layer)
    assert torch.equal(after, torch.rand(()))


def test_carried_variables_hold_again() -> None:
    times: Carried[float] = Carried("times")

    def run(x: Tensor, w: Tensor) -> Tensor:
        return (x * w * (times.get() or 1.0)).tanh()

    w, token = torch.ones(3, requires_grad=True), times.set(0.5)
    y = recomputed(run, torch.ones(3), w)
    times.reset(token)
    y.sum().backward()
    assert torch.allclose(w.grad, 0.5 * (1 - torch.full((3,), 0.5).tanh() ** 2))  # type: ignore[arg-type]


def test_a_run_that_keeps_less_the_second_time_is_refused() -> None:
    seen = []

    def fickle(x: Tensor) -> Tensor:
        seen.append(x)
        return x.exp() if len(seen) > 1 else x.exp().sin()

    y = recomputed(fickle, torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"fickle kept 1 tensors .* and 2 before"):
        y.sum().backward()


def test_the_last_product_of_a_run_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(inputs: int, outputs: int) -> LinearParts:
        a, b = torch.randn(2, inputs), torch.randn(outputs, 2)
        return LinearParts(
            torch.randn(outputs, inputs),
            None,
            (LoraTerm(a.requires_grad_(), b.requires_grad_(), 0.5),),
        )

    first, second = part(6, 5), part(5, 6)
    leaves = [m for p in (first, second) for m in (p.terms[0].a, p.terms[0].b)]

    def run(x: Tensor) -> Tensor:
        return x + lora_linear(
            lora_linear(x, first.weight, None, first.terms).tanh(),
            second.weight,
            None,
            second.terms,
        )

    products = []
    output = lora._output
    monkeypatch.setattr(
        lora, "_output", lambda x, part, *rest: products.append(part) or output(x, part, *rest)
    )
    x = torch.randn(3, 6, requires_grad=True)
    plain = torch.autograd.grad(run(x).sin().sum(), [x, *leaves])
    assert len(products) == 2
    ours = torch.autograd.grad(recomputed(run, x).sin().sum(), [x, *leaves])
    assert len(products) == 2 + 3
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)
    nested = torch.autograd.grad(
        recomputed(lambda x: recomputed(run, x).tanh(), x).sum(), [x, *leaves]
    )
    for one, other in zip(nested, torch.autograd.grad(run(x).tanh().sum(), [x, *leaves])):
        assert torch.equal(one, other)


TRAIN = """
import sys, torch
sys.path.insert(0, "tests")
from tiny import model
from topwork import AutoModelForCausalLM, LoraConfig, get_peft_model
from topwork.training.optim import AdamW

model().save_pretrained(sys.argv[1])
adapted = get_peft_model(
    AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(target_modules="all-linear")
)
adapted.gradient_checkpointing_enable()
optimizer = AdamW([p for p in adapted.parameters() if p.requires_grad], fused=True)
ids = torch.ones(1, 4, dtype=torch.long)
adapted(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
assert "torch._dynamo" not in sys.modules
"""


def test_a_run_with_checkpointing_does_not_import_torchs_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
