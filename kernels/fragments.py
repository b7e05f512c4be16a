"""A dense 2:4 weight to fragments of Hopper's sparse tensor cores and back on the GPU: see formats/fragment.py for the layout.

A program takes a step, 64 rows by 64 columns. Values travel as integers of their width.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _step(N, K):
    """Of a step [64, 64]: pointers' offsets and which weights there are."""
    row = tl.program_id(0) * 64 + tl.arange(0, 64)[:, None]
    column = tl.program_id(1) * 64 + tl.arange(0, 64)[None, :]
    return row.to(tl.int64) * K + column, (row < N) & (column < K)


@triton.jit
def _places():
    """Of a group [64 rows, 16] in its step: where its two values are, and, per row, group of two and so on, the bits before its code."""
    row = tl.arange(0, 64)[:, None]
    group = tl.arange(0, 16)[None, :]
    lane = row // 16 * 32 + row % 8 * 4 + group % 4
    return group // 8 * 1024 + lane * 8 + group // 4 % 2 * 4 + row // 8 % 2 * 2, row // 8 % 2 * 16 + group % 4 * 4


@triton.jit
def _pack_kernel(w_ptr, values_ptr, codes_ptr, N, K):  # [N, K] integer, [steps, 2048] the same, [steps, 128] int32
    step = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    offset, there = _step(N, K)
    w = tl.load(w_ptr + offset, mask=there, other=0)
    even, odd = tl.split(tl.reshape(w, (64, 16, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    held = (w0 != 0).to(tl.int32) + (w1 != 0).to(tl.int32) * 2 + (w2 != 0).to(tl.int32) * 4 + (w3 != 0).to(tl.int32) * 8
    for _ in tl.static_range(2):  # a group that holds fewer than two also holds its first zeros
        count = (held & 1) + (held >> 1 & 1) + (held >> 2 & 1) + (held >> 3)
        held |= tl.where(count < 2, ~held & (held + 1), 0)
    first = tl.where(held & 1 != 0, 0, tl.where(held & 2 != 0, 1, 2))
    second = tl.where(held & 8 != 0, 3, tl.where(held & 4 != 0, 2, 1))
    place, shift = _places()
    at = values_ptr + step * 2048 + place
    tl.store(at, tl.where(first == 0, w0, tl.where(first == 1, w1, w2)))
    tl.store(at + 1, tl.where(second == 3, w3, tl.where(second == 2, w2, w1)))
    code = tl.reshape(
        (first | second << 2) << shift, (4, 2, 8, 4, 4)
    )  # warp, row of two, row of 8, s and group of two, q
    words = tl.sum(tl.sum(code, 4), 1)
    tl.store(codes_ptr + step * 128 + tl.arange(0, 128), tl.reshape(words, (128,)))


@triton.jit
def _dense_kernel(values_ptr, codes_ptr, out_ptr, N, K):
    step = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    place, shift = _places()
    row = tl.arange(0, 64)[:, None]
    group = tl.arange(0, 16)[None, :]
    word = tl.load(codes_ptr + step * 128 + row // 16 * 32 + row % 8 * 4 + group // 4)
    first = (word >> shift) & 3
    second = (word >> shift >> 2) & 3
    a = tl.load(values_ptr + step * 2048 + place)
    b = tl.load(values_ptr + step * 2048 + place + 1)
    zero = a * 0
    w0 = tl.where(first == 0, a, zero)
    w1 = tl.where(first == 1, a, tl.where(second == 1, b, zero))
    w2 = tl.where(first == 2, a, tl.where(second == 2, b, zero))
    w3 = tl.where(second == 3, b, zero)
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (64, 64))
    offset, there = _step(N, K)
    tl.store(out_ptr + offset, w, mask=there)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] contiguous, of an integer dtype, 2:4 sparse -> values and codes of a Fragment."""
    N, K = weight.shape
    grid = triton.cdiv(N, 64), triton.cdiv(K, 64)
    values = torch.empty(grid[0] * grid[1] * 2048, dtype=weight.dtype, device=weight.device)
    codes = torch.empty(grid[0] * grid[1] * 128, dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        _pack_kernel[grid](weight, values, codes, N, K, num_warps=4)
    return values, codes


def dense(values: torch.Tensor, codes: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The same, values of an integer dtype -> [N, K]."""
    out = torch.empty(N, K, dtype=values.dtype, device=values.device)
    with torch.cuda.device_of(out):
        _dense_kernel[triton.cdiv(N, 64), triton.cdiv(K, 64)](values, codes, out, N, K, num_warps=4)
    return out
