"""y = x W^T + bias for an nm weight and up to eight rows of x: value i of a row picks column (i // n) * m + its code.

Lanes and streams as in walk.py. The columns of a lane depend on nothing before them, and all rows of a warp stand in the same group
of m columns: one line of L1 for each gather, however many rows of x there are.
"""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.early import first_words, inputs_ready, let_next_start
from dlpkit.kernels.lanes import DTYPES, ROWS, add, finish, high, launch, low, rows_of, stream_word, stream_words, zeros
from dlpkit.kernels.runtime import use_ptx


@triton.jit
def _part(
    acc, first, values, codes, x_ptr, stride_x, K,
    START: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, n: tl.constexpr, m: tl.constexpr, V: tl.constexpr,
    PADDED: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Values START to START + COUNT of a step; `first` [L] is the index in the row of the step's first value."""
    W: tl.constexpr = M // 2 if M > 2 else 1  # elements of x in a column
    for j in tl.static_range(START, START + COUNT):
        code = (codes >> (BITS * j)) & ((1 << BITS) - 1)
        if V % n == 0:
            group = first // n
            col = code.to(tl.uint32).to(tl.int64) + j // n * m  # 64 bits: the constant becomes the load's own offset
        else:
            group = (first + j) // n
            col = code.to(tl.uint32).to(tl.int64)
        x = x_ptr + tl.minimum(group * m + col, K - 1) * W if PADDED else x_ptr + group * (m * W) + col * W
        w = low(values[(j - START) // 2], DTYPE) if j % 2 == 0 else high(values[(j - START) // 2], DTYPE)
        acc = add(acc, w, x, stride_x, 0, M, DTYPE, PTX)
    return acc


@triton.jit
def _values(p, PART: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PTX: tl.constexpr, FIRST: tl.constexpr):
    if C == 8 and FIRST:
        return first_words(p + PART * 4 * L, PTX)
    elif C == 8:
        return stream_words(p + PART * 4 * L, PTX)
    else:
        return tl.load(p), tl.load(p + 1)


@triton.jit
def _pick_kernel(
    x_ptr, values_ptr, codes_ptr, bias_ptr, y_ptr,
    N, K, x_rows, steps, stride_x,
    n: tl.constexpr, m: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr, PTX: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    BITS: tl.constexpr = 32 // V
    C: tl.constexpr = V if V < 8 else 8  # values in a part
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, L)
    value_ptrs = values_ptr + block * steps * (V // 2 * L) + lane * (C // 2)  # int32: a pair of values
    code_ptrs = codes_ptr + block * steps * L + lane
    first = lane // R * (steps * V)  # [L]
    row = block * R + tl.arange(0, R)
    acc = zeros(L, M)
    values = _values(value_ptrs, 0, C, L, PTX, True)
    if V == 16:
        more = _values(value_ptrs, 1, C, L, PTX, True)
    codes = tl.load(code_ptrs)
    inputs_ready(EARLY)
    for step in range(steps):
        ahead = (step + 1 < steps).to(tl.int32)  # the last step reads itself again
        value_ptrs += ahead * (V // 2 * L)
        code_ptrs += ahead * L
        next_values = _values(value_ptrs, 0, C, L, PTX, False)
        if V == 16:
            next_more = _values(value_ptrs, 1, C, L, PTX, False)
        next_codes = stream_word(code_ptrs, PTX)
        acc = _part(acc, first, values, codes, x_ptr, stride_x, K, 0, C, BITS, n, m, V, PADDED, M, DTYPE, PTX)
        if V == 16:
            acc = _part(acc, first, more, codes, x_ptr, stride_x, K, 8, C, BITS, n, m, V, PADDED, M, DTYPE, PTX)
            more = next_more
        values = next_values
        codes = next_codes
        first += V
    let_next_start(EARLY and M != 2)  # at two rows the next kernel's programs settle unevenly
    bias = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32) if BIAS else tl.zeros([R], tl.float32)
    finish(acc, row, bias, y_ptr, N, x_rows, M, R, S)


def pick(
    x, values, codes, bias, N: int, n: int, m: int, rows: int, segments: int, step: int, steps: int
) -> torch.Tensor:
    """x [M, K] and the fields of an NM, values of x's 16-bit dtype -> [M, N]; eight rows of x to a launch."""
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    for i in range(0, x.shape[0], ROWS):
        _pick(x[i : i + ROWS], values, codes, bias, y[i:], N, n, m, rows, segments, step, steps)
    return y


def _registers(M: int, V: int) -> tuple[int, int]:
    """`launch`'s fewest and crowded, measured: a step of 16 values loads 16 words of x at once where registers allow."""
    return (64, 64) if M == 8 else (40, 64) if V == 16 else (32, 32)


def _pick(x, values, codes, bias, y, N, n, m, rows, segments, step, steps) -> None:
    K = x.shape[1]
    prepared, M, _ = rows_of(x, planes=False)
    programs = triton.cdiv(N, rows)
    _pick_kernel[(programs,)](
        prepared, values.view(torch.int32), codes, y if bias is None else bias, y,
        N, K, x.shape[0], steps, prepared.stride(0),
        n=n, m=m, V=step, PADDED=K % m != 0 or segments * steps * step != K // m * n,
        M=M, R=rows, S=segments, DTYPE=DTYPES[values.dtype], BIAS=bias is not None, PTX=use_ptx(),
        **launch(programs, rows * segments, M, *_registers(M, step), x.device),
    )  # fmt: skip
