"""y = x W^T + bias for a sell weight and up to eight rows of x: every thread walks the slots of one lane.

A lane reads 16 bytes of values and one word of gaps per step, one step ahead of the one it works on, and gathers x at its column.
Nothing is shared until the segments of a row are added at the end: no prefix scan, no shared memory, no atomics, and the same sum
in the same order every time. Every tensor has one dimension, [rows * segments] lanes, one to a thread; with two, Triton converts
layouts through shared memory at every gather.

The memory system is the limit. At M = 1 it is the device memory, at 9 to 11 instructions per value. From M = 4 it is L1, which
serves one 128-byte line of x per cycle: a warp is 32 rows at about the same column, and reads as many lines as their columns lie
apart. So packing puts rows that drift alike into one slice, and x comes as planes of two rows in 32 bits, [pair][column], where a
line holds 32 columns; with all eight rows of a column side by side a line holds 8, and the walk is slower.
"""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.early import first_words, inputs_ready, let_next_start
from dlpkit.kernels.lanes import DTYPES, ROWS, add, finish, high, launch, low, rows_of, stream_word, stream_words, zeros
from dlpkit.kernels.runtime import use_ptx


@triton.jit
def _step(
    acc, col, values, gaps, x_ptr, stride_x,
    PLANE: tl.constexpr, SLOTS: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    for j in tl.static_range(SLOTS):
        col += (gaps >> (4 * j)) & 15
        w = low(values[j // 2], DTYPE) if j % 2 == 0 else high(values[j // 2], DTYPE)
        acc = add(acc, w, x_ptr + col.to(tl.uint32), stride_x, PLANE, M, DTYPE, PTX)
    return acc, col


@triton.jit
def _last(value_ptrs, gap_ptrs, rest, L: tl.constexpr):
    """The `rest` pairs of a step that is not full, and its gaps; zeros past them."""
    lane = tl.arange(0, L)
    return (
        tl.load(value_ptrs, mask=(lane >= 0) & (rest > 0), other=0),
        tl.load(value_ptrs + L, mask=(lane >= 0) & (rest > 1), other=0),
        tl.load(value_ptrs + 2 * L, mask=(lane >= 0) & (rest > 2), other=0),
        tl.load(gap_ptrs, mask=(lane >= 0) & (rest > 0), other=0),
    )


@triton.jit
def _walk_kernel(
    x_ptr, values_ptr, gaps_ptr, bases_ptr, order_ptr, pairs_ptr, steps_ptr, bias_ptr, y_ptr,
    N, x_rows, stride_x,
    PLANE: tl.constexpr, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr,
    PTX: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, L)
    pairs_before = tl.load(pairs_ptr + block).to(tl.int64)
    pairs = (tl.load(pairs_ptr + block + 1) - pairs_before).to(tl.int32)
    steps_before = tl.load(steps_ptr + block).to(tl.int64)
    col = tl.load(bases_ptr + block * L + lane).to(tl.int32)  # [L]
    row = tl.load(order_ptr + block * R + tl.arange(0, R))  # [R]
    acc = zeros(L, M)

    full = pairs // 4
    rest = pairs - 4 * full
    value_ptrs = values_ptr + pairs_before * L + 4 * lane  # int32: a pair of values
    gap_ptrs = gaps_ptr + steps_before * L + lane
    last_ptrs = values_ptr + (pairs_before + 4 * full) * L + lane
    if full > 0:
        values = first_words(value_ptrs, PTX)
        gaps = tl.load(gap_ptrs)
        inputs_ready(EARLY)
        for _ in range(1, full):
            value_ptrs += 4 * L
            gap_ptrs += L
            next_values = stream_words(value_ptrs, PTX)
            next_gaps = stream_word(gap_ptrs, PTX)
            acc, col = _step(acc, col, values, gaps, x_ptr, stride_x, PLANE, 8, M, DTYPE, PTX)
            values = next_values
            gaps = next_gaps
        last = _last(last_ptrs, gap_ptrs + L, rest, L)
        acc, col = _step(acc, col, values, gaps, x_ptr, stride_x, PLANE, 8, M, DTYPE, PTX)
    else:
        last = _last(last_ptrs, gap_ptrs, rest, L)
        inputs_ready(EARLY)
    if rest > 0:
        acc, col = _step(acc, col, last, last[3], x_ptr, stride_x, PLANE, 6, M, DTYPE, PTX)
    let_next_start(EARLY)
    bias = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32) if BIAS else tl.zeros([R], tl.float32)
    finish(acc, row, bias, y_ptr, N, x_rows, M, R, S)


def walk(x, values, gaps, bases, order, pairs, steps, bias, N: int, rows: int, segments: int) -> torch.Tensor:
    """x [M, K] and the fields of a Sell, values of x's 16-bit dtype -> [M, N]; eight rows of x to a launch."""
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    for i in range(0, x.shape[0], ROWS):
        _walk(x[i : i + ROWS], values, gaps, bases, order, pairs, steps, bias, y[i:], N, rows, segments)
    return y


def _walk(x, values, gaps, bases, order, pairs, steps, bias, y, N: int, rows: int, segments: int) -> None:
    prepared, M, plane = rows_of(x, planes=True)
    programs = pairs.numel() - 1
    _walk_kernel[(programs,)](
        prepared, values.view(torch.int32), gaps, bases, order, pairs, steps, y if bias is None else bias, y,
        N, x.shape[0], prepared.stride(0),
        PLANE=plane, M=M, R=rows, S=segments, DTYPE=DTYPES[values.dtype], BIAS=bias is not None,
        PTX=use_ptx(), **launch(programs, rows * segments, M, 32, 32, x.device),
    )  # fmt: skip
