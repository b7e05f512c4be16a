"""Packed weights back to dense [N, K] on the GPU: lanes as in walk.py and pick.py, each storing its values into a zeroed weight.

What larger batches multiply by, and what `dense()` returns. A slot whose value bits are all zero holds no weight and stores nothing,
so -0.0 comes back and fillers do not overwrite. Any 16-bit dtype: values travel as bits.
"""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.lanes import stream_word, stream_words
from dlpkit.kernels.runtime import use_ptx


@triton.jit
def _store(out_ptr, row, col, pair, K, N, HIGH: tl.constexpr):
    """The first or second half of each pair [L] of 16-bit values."""
    value = (pair >> 16).to(tl.int16) if HIGH else pair.to(tl.int16)
    tl.store(out_ptr + row * K + col, value, mask=(value != 0) & (row < N))


@triton.jit
def _sell_kernel(
    values_ptr, gaps_ptr, bases_ptr, order_ptr, pairs_ptr, steps_ptr, out_ptr,
    N, K,
    R: tl.constexpr, S: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, L)
    pairs_before = tl.load(pairs_ptr + block).to(tl.int64)
    pairs = (tl.load(pairs_ptr + block + 1) - pairs_before).to(tl.int32)
    steps_before = tl.load(steps_ptr + block).to(tl.int64)
    col = tl.load(bases_ptr + block * L + lane).to(tl.int32)  # [L]
    row = tl.load(order_ptr + block * R + lane % R).to(tl.int64)
    full = pairs // 4
    value_ptrs = values_ptr + pairs_before * L
    gap_ptrs = gaps_ptr + steps_before * L + lane
    for step in range(full):
        values = stream_words(value_ptrs + step * (4 * L) + 4 * lane, PTX)
        gaps = stream_word(gap_ptrs + step * L, PTX)
        for j in tl.static_range(8):
            col += (gaps >> (4 * j)) & 15
            _store(out_ptr, row, col, values[j // 2], K, N, j % 2 == 1)
    if pairs > 4 * full:
        gaps = tl.load(gap_ptrs + full * L)
        for j in tl.static_range(6):
            col += (gaps >> (4 * j)) & 15
            there = (lane >= 0) & (4 * full + j // 2 < pairs)
            pair = tl.load(value_ptrs + (4 * full + j // 2) * L + lane, mask=there, other=0)
            _store(out_ptr, row, col, pair, K, N, j % 2 == 1)


@triton.jit
def _nm_kernel(
    values_ptr, codes_ptr, out_ptr,
    N, K, steps,
    n: tl.constexpr, m: tl.constexpr, V: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    BITS: tl.constexpr = 32 // V
    C: tl.constexpr = V if V < 8 else 8
    block = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    lane = tl.arange(0, L)
    row = block * R + lane % R
    first = lane // R * (steps * V) + step * V  # [L]
    at = block * steps + step
    codes = tl.load(codes_ptr + at * L + lane)
    for j in tl.static_range(V):
        pair = tl.load(values_ptr + at * (V // 2 * L) + j // C * (C // 2 * L) + lane * (C // 2) + j % C // 2)
        col = (first + j) // n * m + ((codes >> (BITS * j)) & ((1 << BITS) - 1))
        _store(out_ptr, row, col, pair, K, N, j % 2 == 1)


def sell(values, gaps, bases, order, pairs, steps, N: int, K: int, rows: int, segments: int) -> torch.Tensor:
    """The fields of a Sell -> [N, K]."""
    out = torch.zeros(N, K, dtype=values.dtype, device=values.device)
    _sell_kernel[(pairs.numel() - 1,)](
        values.view(torch.int32), gaps, bases, order, pairs, steps, out.view(torch.int16),
        N, K, R=rows, S=segments, PTX=use_ptx(), num_warps=max(1, rows * segments // 32),
    )  # fmt: skip
    return out


def nm(values, codes, N: int, K: int, n: int, m: int, rows: int, segments: int, step: int, steps: int) -> torch.Tensor:
    """The fields of an NM -> [N, K]."""
    out = torch.zeros(N, K, dtype=values.dtype, device=values.device)
    _nm_kernel[triton.cdiv(N, rows), steps](
        values.view(torch.int32), codes, out.view(torch.int16),
        N, K, steps, n=n, m=m, V=step, R=rows, S=segments, num_warps=max(1, rows * segments // 32),
    )  # fmt: skip
    return out
