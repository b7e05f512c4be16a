"""Packed weights back to dense [N, K] on the GPU: what larger batches multiply by, and what `dense()` returns.

A program takes some lanes of a slice and a stretch of their slots, [SLOTS, LANES] with the slot fastest across threads,
so that a warp stores neighbours of one row: a lane to a thread, as the walk has it, would write every value to a sector of its own.
A slot whose value bits are all zero holds no weight and stores nothing, so -0.0 comes back. Any 16-bit dtype: values travel as bits.
"""

import torch
import triton
import triton.language as tl

SLOTS = 64  # of a lane at a time


@triton.jit
def _sell_kernel(
    values_ptr, gaps_ptr, bases_ptr, order_ptr, pairs_ptr, steps_ptr, out_ptr,  # values and out int16
    N, K,
    R: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    block = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]  # [1, LANES]
    pairs_before = tl.load(pairs_ptr + block).to(tl.int64)
    steps_before = tl.load(steps_ptr + block).to(tl.int64)
    pairs = (tl.load(pairs_ptr + block + 1) - pairs_before).to(tl.int32)
    col = tl.load(bases_ptr + block * L + lane).to(tl.int32)
    row = tl.load(order_ptr + block * R + lane % R).to(tl.int64)
    slot = tl.arange(0, SLOTS)[:, None] % 8
    for start in range(0, (pairs + 3) // 4, SLOTS // 8):
        step = start + tl.arange(0, SLOTS)[:, None] // 8  # [SLOTS, 1]
        there = (lane >= 0) & (4 * step + slot // 2 < pairs)
        gaps = tl.load(gaps_ptr + (steps_before + step) * L + lane, mask=there, other=0)
        gaps = (gaps >> (4 * slot)) & 15
        at = tl.where(4 * step + 4 <= pairs, lane * 8 + slot, slot // 2 * (2 * L) + lane * 2 + slot % 2)
        value = tl.load(values_ptr + (pairs_before + 4 * step) * (2 * L) + at, mask=there, other=0)
        tl.store(out_ptr + row * K + col + tl.cumsum(gaps, 0), value, mask=(value != 0) & (row < N))
        col += tl.sum(gaps, 0)[None, :]


@triton.jit
def _nm_kernel(
    values_ptr, codes_ptr, out_ptr,  # values and out int16
    N, K, steps,
    n: tl.constexpr, m: tl.constexpr, V: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    BITS: tl.constexpr = 32 // V
    C: tl.constexpr = V if V < 8 else 8
    block = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]  # [1, LANES]
    row = block * R + lane % R
    slot = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)[:, None]  # [SLOTS, 1] of the lane
    there = (row < N) & (slot < steps * V)
    step = block * steps + slot // V
    code = (tl.load(codes_ptr + step * L + lane, mask=there, other=0) >> (slot % V * BITS)) & ((1 << BITS) - 1)
    value = tl.load(values_ptr + (step * (V // C) + slot % V // C) * (L * C) + lane * C + slot % C, mask=there, other=0)
    col = (lane // R * (steps * V) + slot) // n * m + code
    tl.store(out_ptr + row * K + col, value, mask=value != 0)


def sell(values, gaps, bases, order, pairs, steps, N: int, K: int, rows: int, segments: int) -> torch.Tensor:
    """The fields of a Sell -> [N, K]."""
    out = torch.zeros(N, K, dtype=values.dtype, device=values.device)
    lanes = min(32, rows * segments)
    _sell_kernel[pairs.numel() - 1, rows * segments // lanes](
        values.view(torch.int16), gaps, bases, order, pairs, steps, out.view(torch.int16),
        N, K, R=rows, S=segments, LANES=lanes, SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip
    return out


def nm(values, codes, N: int, K: int, n: int, m: int, rows: int, segments: int, step: int, steps: int) -> torch.Tensor:
    """The fields of an NM -> [N, K]."""
    out = torch.zeros(N, K, dtype=values.dtype, device=values.device)
    lanes = min(32, rows * segments)
    _nm_kernel[triton.cdiv(N, rows), rows * segments // lanes, triton.cdiv(steps * step, SLOTS)](
        values.view(torch.int16), codes, out.view(torch.int16),
        N, K, steps, n=n, m=m, V=step, R=rows, S=segments, LANES=lanes, SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip
    return out
