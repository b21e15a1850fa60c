"""Triton greedy choices: k dependent steps in one launch, one program per image.

The state of a token stays in the registers of one thread, whatever N is; beyond 32768 tokens they spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.reference import EXHAUSTED

# Elements that the sum over the chosen tokens loads at once, for many loads in flight.
TILE = 16384


@triton.jit  # type: ignore[untyped-decorator]
def farthest_first_kernel(  # type: ignore[no-untyped-def]
    p_weight,
    p_distance,
    p_start,
    p_lengths,
    p_out,
    N,
    K,
    stride_wg,
    stride_wn,
    stride_dg,
    stride_dr,
    stride_dc,
    stride_sg,
    stride_lg,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    wide = o_n.to(tl.int64)
    length = tl.cast(N, tl.int32)
    if p_lengths is not None:
        length = tl.load(p_lengths + g * stride_lg).to(tl.int32)
    free = o_n < length
    # [BLOCK_N]
    weight = tl.load(p_weight + g * stride_wg + wide * stride_wn, mask=free, other=0).to(ACC)
    nearest = tl.full([BLOCK_N], float("inf"), ACC)
    # NaN would lose against lanes behind the last token, which have no row.
    last = tl.argmax(tl.where(free & (weight > float("-inf")), weight, float("-inf")), 0)
    if p_start is not None:
        last = tl.load(p_start + g * stride_sg).to(tl.int32)
    p_out += g * K
    tl.store(p_out, last)
    for step in range(1, K):
        p_row = p_distance + g * stride_dg + last.to(tl.int64) * stride_dr
        # [BLOCK_N]
        row = tl.load(p_row + wide * stride_dc, mask=o_n < N, other=0).to(ACC)
        nearest = tl.minimum(nearest, tl.maximum(row, 0.0))
        free = free & (o_n != last)
        value = weight * nearest
        last = tl.argmax(tl.where(free & (value > float("-inf")), value, float("-inf")), 0)
        tl.store(p_out + step, tl.where(step < length, last, -1))


@triton.jit  # type: ignore[untyped-decorator]
def dpp_map_kernel(  # type: ignore[no-untyped-def]
    p_kernel,
    p_lengths,
    p_rows,
    p_out,
    N,
    K,
    WIDTH,
    stride_kg,
    stride_kr,
    stride_kc,
    stride_lg,
    EXHAUSTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    o_i = tl.arange(0, BLOCK_I)
    wide = o_n.to(tl.int64)
    length = tl.cast(N, tl.int32)
    if p_lengths is not None:
        length = tl.load(p_lengths + g * stride_lg).to(tl.int32)
    inside = o_n < length
    p_kernel += g * stride_kg
    p_rows += g * K * WIDTH
    p_out += g * K
    # [BLOCK_N]
    own = tl.load(p_kernel + wide * (stride_kr + stride_kc), mask=inside, other=0).to(ACC)
    # NaN would lose against lanes behind the last token, which have no row.
    gain = tl.where(inside & (own > float("-inf")), own, float("-inf"))
    p_next = p_rows
    for step in range(K):
        best, j = tl.max(gain, 0, return_indices=True)
        tl.store(p_out + step, tl.where(step < length, j, -1))
        # [BLOCK_N]
        row = tl.load(p_kernel + j.to(tl.int64) * stride_kr + wide * stride_kc, mask=o_n < N, other=0).to(ACC)
        for i in range(0, step, BLOCK_I):
            there = i + o_i < step
            p_before = p_rows + (i + o_i).to(tl.int64) * WIDTH
            # [BLOCK_I]
            weight = tl.load(p_before + j, mask=there, other=0)
            # [BLOCK_I, BLOCK_N]
            before = tl.load(
                p_before[:, None] + o_n[None, :], mask=there[:, None] & (o_n < WIDTH)[None, :], other=0
            )
            row -= tl.sum(weight[:, None] * before, 0)
        if ACC == tl.float32:  # noqa: SIM300
            row = tl.div_rn(row, tl.sqrt_rn(tl.where(best > 0, best, float("inf"))))
        else:
            row = row / tl.sqrt(tl.where(best > 0, best, float("inf")))
        tl.store(p_next + o_n, row, mask=o_n < WIDTH)
        p_next += WIDTH
        # The next step reads this row with other threads than those that wrote it.
        tl.debug_barrier()
        gain -= row * row
        gain = tl.where((gain <= EXHAUSTED * own) & (gain > float("-inf")), 0.0, gain)
        gain = tl.where((o_n != j) & (gain > float("-inf")), gain, float("-inf"))


def farthest_first(
    weight: Tensor, distance: Tensor, k: int, start: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """As :func:`vtprune.kernels.reference.farthest_first`, bit for bit, by one launch."""
    images, n = weight.shape
    out = torch.empty(images, k, dtype=torch.int64, device=weight.device)
    block = triton.next_power_of_2(n)
    wide = torch.float64 in (weight.dtype, distance.dtype)
    if out.numel():
        with torch.cuda.device_of(weight):
            farthest_first_kernel[(images,)](
                weight,
                distance,
                start,
                lengths,
                out,
                n,
                k,
                *weight.stride(),
                *distance.stride(),
                0 if start is None else start.stride(0),
                0 if lengths is None else lengths.stride(0),
                ACC=tl.float64 if wide else tl.float32,
                BLOCK_N=block,
                num_warps=min(max(block // 256, 1), 32),
                num_stages=1,
            )
    return out


def dpp_map(kernel: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    """As :func:`vtprune.kernels.reference.dpp_map`, but for rounding, by one launch; the same in every run."""
    images, n = kernel.shape[:2]
    wide = kernel.dtype == torch.float64
    width = triton.cdiv(n, 16) * 16  # as a multiple of 16, rows are read by four numbers at once
    rows = torch.empty(images, k, width, dtype=torch.float64 if wide else torch.float32, device=kernel.device)
    out = torch.empty(images, k, dtype=torch.int64, device=kernel.device)
    block = triton.next_power_of_2(n)
    if out.numel():
        with torch.cuda.device_of(kernel):
            dpp_map_kernel[(images,)](
                kernel,
                lengths,
                rows,
                out,
                n,
                k,
                width,
                *kernel.stride(),
                0 if lengths is None else lengths.stride(0),
                EXHAUSTED=EXHAUSTED,
                ACC=tl.float64 if wide else tl.float32,
                BLOCK_I=min(max(TILE // block, 1), 32),
                BLOCK_N=block,
                num_warps=min(max(block // 128, 4), 32),
                num_stages=1,
            )
    return out
