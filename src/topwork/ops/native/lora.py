"""The thin products of LoRA in bf16 on AMX tiles (`lora.c`)."""

from __future__ import annotations

import torch
from torch import Tensor

from topwork.ops.native.attention import has_amx
from topwork.ops.native.build import call

WIDEST = 128  # ranks beyond this are no thin products


def serves(x: Tensor, thin: Tensor) -> bool:
    """Whether the kernels take `x` [T, C] beside a thin matrix, [R, C] or [T, R]."""
    return x.dtype == thin.dtype and min(thin.shape) <= WIDEST and serves_wide(x)


def serves_wide(x: Tensor) -> bool:
    """Whether they take `x` [T, C] beside something thin."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and x.shape[1] % 32 == 0
        and has_amx()
    )


def down(x: Tensor, stacked: Tensor, key: int, threshold: int, scale: float) -> Tensor:
    """drop(x) Aᵀ for `x` [T, C], `stacked` [R, C] → [T, R]."""
    low = x.new_empty(len(x), len(stacked))
    call("topwork_lora_down", x, stacked, low, *x.shape, len(stacked), key, threshold, scale)
    return low


def up_grads(dy: Tensor, low: Tensor, b: Tensor, ups: Tensor, scale: float) -> Tensor:
    """Fills `ups` [T, r] with dy (scale · B); returns dB [N, r] fp32.

    `low` and `ups` are the same columns of matrices of one width.
    """
    db = torch.empty(b.shape, dtype=torch.float32)
    wide = b.float().contiguous()
    call(
        "topwork_lora_up_grads", dy, low, wide, ups, db, *dy.shape, b.shape[1], low.stride(0), scale
    )
    return db


def down_grads(
    x: Tensor,
    ups: Tensor,
    stacked: Tensor,
    dx: Tensor | None,
    key: int,
    threshold: int,
    scale: float,
) -> Tensor:
    """Adds drop(ups A) to `dx` [T, C], if given; returns dA [R, C] fp32."""
    da = torch.empty(stacked.shape, dtype=torch.float32)
    onto = x if dx is None else dx
    sizes = (*x.shape, len(stacked), int(dx is not None))
    call("topwork_lora_down_grads", x, ups, stacked, onto, da, *sizes, key, threshold, scale)
    return da


def row_norms(cross: Tensor, b: Tensor, gram: Tensor, own: Tensor, scale: float) -> Tensor:
    """√(own + 2s · ⟨B, cross⟩ + s² · ⟨B, B gram⟩) of each row: cross [N, r] bf16, others fp32."""
    norms = torch.empty_like(own)
    call("topwork_lora_row_norms", cross, b, gram, own, norms, *b.shape, scale)
    return norms


def gained(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """dy · gain [T, N], and Σ dy · z [N] fp32 over the rows."""
    dz, dgain = torch.empty_like(dy), torch.empty(dy.shape[1], dtype=torch.float32)
    call("topwork_lora_gained", dy, z, gain, dz, dgain, *dy.shape)
    return dz, dgain
