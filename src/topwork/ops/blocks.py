"""Values of 4 bits in flat blocks: each is a level times the factor of its block.

Two codes lie in a byte, the earlier one in the high half (the layout of bitsandbytes). A block
runs on over the end of a row; the last one may be short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.dispatch import Op
from topwork.ops.native import blocks as native


@Op
def decode_blocks(
    codes: Tensor, factors: Tensor, levels: Tensor, block: int, out: Tensor
) -> Tensor:
    """Fills `out` [...] from codes [⌈n/2⌉] uint8, factors [⌈n/block⌉] fp32, levels [16] fp32.

    The product is formed in fp32 and rounded once.
    """
    count = out.numel()
    places = torch.stack((codes >> 4, codes & 15), -1).flatten()[:count]
    padded = F.pad(levels[places.int()], (0, -count % block))
    values = (padded.view(-1, block) * factors[:, None]).flatten()[:count]
    return out.copy_(values.view(out.shape))


def _native_decodes(
    codes: Tensor, factors: Tensor, levels: Tensor, block: int, out: Tensor
) -> bool:
    bf16 = out.dtype == torch.bfloat16
    return bf16 and native.serves(out.numel(), block, codes, factors, levels, out)


@decode_blocks.variant("native", when=_native_decodes)
def native_decode(
    codes: Tensor, factors: Tensor, levels: Tensor, block: int, out: Tensor
) -> Tensor:
    """By lookup: a block has but 16 values."""
    native.decode(codes, factors, levels, out, block)
    return out


@Op
def encode_blocks(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes [⌈n/2⌉] uint8 and factors [⌈n/block⌉] fp32 of `values` [n] fp32: the nearest levels,
    where each block's largest value is ±1."""
    count = len(values)
    edges, order = edges_of(levels)
    blocks = F.pad(values, (0, -count % block)).view(-1, block)
    factors = blocks.abs().amax(1)
    scaled = blocks * (1.0 / factors.clamp(min=1e-38))[:, None]
    places = torch.bucketize(scaled.clamp_(-1, 1).flatten(), edges, out_int32=True)
    codes = order[places[: count + count % 2]]
    return codes[0::2] << 4 | codes[1::2], factors


def _native_encodes(values: Tensor, levels: Tensor, block: int) -> bool:
    return values.dtype == torch.float32 and native.serves(len(values), block, values)


@encode_blocks.variant("native", when=_native_encodes)
def native_encode(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """By counting the edges below each value."""
    return native.encode(values, *edges_of(levels), block)


def edges_of(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The edges [15] between the ascending levels, and which level each of them is."""
    order = levels.argsort(stable=True)
    ascending = levels[order]
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)
