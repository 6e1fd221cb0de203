"""Tokens of one block see each other whatever their order: the mask by its definition, and every
variant of attention against the reference."""

from __future__ import annotations

import pytest
import torch

from topwork import ops
from topwork.ops.attention import attention, visible

IDS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1], [0, 0, -1, -1, -1, -1, 1, 1, 1]])


def sees(q, k, ids, window, windowed):
    """Whether the query at q sees the key at k, in words: what came before, or its own block; a
    window hides both, or what came before alone."""
    before, same = k <= q, ids[q] == ids[k] and ids[q] >= 0
    near = window is None or q - k < window
    return (before or same) and near if windowed else (before and near) or same


@pytest.mark.parametrize("windowed", [True, False], ids=["windowed", "whole"])
@pytest.mark.parametrize("window", [None, 2, 4])
def test_the_mask_is_its_definition(window, windowed):
    rule = ops.Rule(1.0, window=window)
    layout = ops.Layout(blocks=ops.Blocks(IDS, windowed))
    found = visible(layout, 9, 9, rule, IDS.device)
    wanted = [[[sees(q, k, row, window, windowed) for k in range(9)] for q in range(9)]
              for row in IDS.tolist()]  # fmt: skip
    assert found[:, 0].tolist() == wanted


def test_padding_is_seen_by_no_block_and_new_queries_see_theirs():
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :2] = False
    layout = ops.Layout(keep=keep, blocks=ops.Blocks(IDS))
    found = visible(layout, 9, 9, ops.Rule(1.0), IDS.device)[1, 0]
    assert not bool(found[2:, :2].any())
    later = ops.Layout(None, 5, None, ops.Blocks(IDS))
    mask = visible(later, 4, 9, ops.Rule(1.0), IDS.device)
    whole = visible(ops.Layout(blocks=ops.Blocks(IDS)), 9, 9, ops.Rule(1.0), IDS.device)
    assert torch.equal(mask, whole[:, :, 5:])


def heads(*shape, seed):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


@pytest.mark.parametrize("windowed", [True, False], ids=["windowed", "whole"])
@pytest.mark.parametrize("window", [None, 3])
def test_rows_and_packed_documents_equal_the_reference(window, windowed):
    rule = ops.Rule(0.3, window=window)
    q, k, v = (heads(2, 9, 4, 8, seed=i) for i in range(3))
    layout = ops.Layout(blocks=ops.Blocks(IDS, windowed))
    wanted = attention.reference(q, k, v, layout, rule)
    grads = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    found = attention(q, k, v, layout, rule)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), grads):
        torch.testing.assert_close(mine, theirs)
    packed = ops.Layout((9, 9), blocks=ops.Blocks(IDS.view(1, -1), windowed))
    flat = [t.reshape(1, 18, 4, 8) for t in (q, k, v)]
    torch.testing.assert_close(attention(*flat, packed, rule).view(2, 9, 4, 8), wanted)
    torch.testing.assert_close(attention.reference(*flat, packed, rule).view(2, 9, 4, 8), wanted)


def test_documents_that_share_a_beginning_keep_their_blocks():
    """A beginning of 3 tokens that see each other, and two answers of 2 and 3 tokens."""
    rule, ids = ops.Rule(0.3), torch.tensor([[0, 0, 0, -1, -1, -1, -1, -1]])
    q, k, v = (heads(1, 8, 2, 4, seed=i) for i in range(3))
    found = attention(q, k, v, ops.Layout(((3, 2, 3),), blocks=ops.Blocks(ids)), rule)
    for rows in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7]):
        one = [t[:, rows] for t in (q, k, v)]
        alone = attention(*one, ops.Layout(blocks=ops.Blocks(ids[:, rows])), rule)
        torch.testing.assert_close(found[:, rows], alone)


def test_bf16_tiles_leave_blocks_to_others():
    q, k, v = (heads(1, 9, 2, 32, seed=i).detach().bfloat16() for i in range(3))
    layout = ops.Layout(blocks=ops.Blocks(IDS[:1]))
    found = attention(q, k, v, layout, ops.Rule(0.2)).float()
    wanted = attention.reference(*(t.float() for t in (q, k, v)), layout, ops.Rule(0.2))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
