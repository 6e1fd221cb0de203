from __future__ import annotations

import pytest
import torch

from topwork.ops.scan import CHUNK, chunked_scan, selective_scan


def tensors(tokens, batch=2, channels=3, size=4):
    torch.manual_seed(0)
    x, dt = torch.randn(batch, tokens, channels), torch.rand(batch, tokens, channels) * 2
    a, state = -torch.rand(channels, size) * 3, torch.randn(batch, channels, size)
    b, c = torch.randn(batch, tokens, size), torch.randn(batch, tokens, size)
    starts = torch.rand(batch, tokens) < 0.05
    return [x, dt, a, b, c], starts, state


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 7])
def test_chunks_give_the_numbers_and_gradients_of_the_reference(tokens):
    inputs, starts, state = tensors(tokens)
    found = []
    for run in (selective_scan.reference, chunked_scan):
        given = [t.double().requires_grad_() for t in (*inputs, state)]
        y, last = run(*given[:5], starts, given[5])
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)
        ((y * weight).sum() + (last**2).sum()).backward()
        found.append([y, last, *(t.grad for t in given)])
    for wanted, got in zip(*found):
        torch.testing.assert_close(got, wanted)


def test_the_scan_is_the_recurrence():
    (x, dt, a, b, c), _, state = tensors(3, batch=1, channels=1, size=1)
    y, last = selective_scan(x, dt, a, b, c, torch.zeros(1, 3, dtype=torch.bool), state)
    h = state.item()
    for t in range(3):
        step, u = dt[0, t, 0].item(), x[0, t, 0].item()
        h = torch.exp(step * a[0, 0]).item() * h + step * u * b[0, t, 0].item()
        assert y[0, t, 0].item() == pytest.approx(h * c[0, t, 0].item(), rel=1e-4)
    assert last.item() == pytest.approx(h, rel=1e-4)


def test_nothing_is_remembered_across_a_start():
    inputs, _, state = tensors(9)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, 5] = True
    whole, last = selective_scan(*inputs, starts, state)
    x, dt, a, b, c = inputs
    rest = [t[:, 5:] for t in (x, dt, b, c)]
    alone, end = selective_scan(
        *rest[:2], a, *rest[2:], torch.zeros(2, 4, dtype=torch.bool), torch.zeros_like(state)
    )
    torch.testing.assert_close(whole[:, 5:], alone)
    torch.testing.assert_close(last, end)
