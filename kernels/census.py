"""Counts and sums over the scores of a weight, one read each, without holding a score: see score.py for what they are for.

A histogram of 16 bits has more bins than a program has room for, so programs add to one in global memory; additions of integers come out
the same in any order. COPIES of it share the traffic.
"""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.runtime import multiprocessors
from dlpkit.kernels.score import Scores
from dlpkit.kernels.terms import arguments, score_bits

BLOCK, NUM_WARPS = 2048, 4
COPIES = 64
RESIDENT = 8  # programs of a multiprocessor


@triton.jit
def _tile(
    w_ptr, index, tiles_k, K, stride_w, scale_ptr, row_ptr, column_ptr,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Scores as bits, and which of them are there, of tile `index`: BLOCK columns of a row."""
    row = (index // tiles_k).to(tl.int64)
    col = index % tiles_k * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + row * stride_w + col, mask=col < K, other=0.0)
    return score_bits(w, row, col, col < K, scale_ptr, row_ptr, column_ptr, SCALE, SHARES), col < K


@triton.jit
def _histogram_kernel(
    w_ptr, counts_ptr, top_ptr, scale_ptr, row_ptr, column_ptr,  # [N, K], [COPIES, bins] int32, [1] int64 upper bits
    tiles, tiles_k, K, stride_w,
    BLOCK: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr, LOWER: tl.constexpr, SCALE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    counts_ptr += tl.program_id(0) % COPIES * BINS
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, there = _tile(w_ptr, index, tiles_k, K, stride_w, scale_ptr, row_ptr, column_ptr, BLOCK, SCALE, SHARES)
        upper = (x >> 16) & 0x7FFF
        if LOWER:
            tl.atomic_add(counts_ptr + (x & 0xFFFF), 1, mask=there & (upper == tl.load(top_ptr)), sem="relaxed")
        else:
            tl.atomic_add(counts_ptr + upper, 1, mask=there, sem="relaxed")


@triton.jit
def _total_kernel(
    w_ptr, out_ptr, threshold_ptr, scale_ptr, row_ptr, column_ptr,  # [N, K], [programs] float64, [1] float32
    tiles, tiles_k, K, stride_w,
    BLOCK: tl.constexpr, ABOVE: tl.constexpr, SCALE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float64)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, there = _tile(w_ptr, index, tiles_k, K, stride_w, scale_ptr, row_ptr, column_ptr, BLOCK, SCALE, SHARES)
        score = x.to(tl.float32, bitcast=True)
        if ABOVE:
            total += (there & (score > tl.load(threshold_ptr))).to(tl.float64)
        else:
            total += tl.where(there, score, 0.0).to(tl.float64)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _equal_kernel(
    w_ptr, out_ptr, threshold_ptr, scale_ptr, row_ptr, column_ptr,  # [N, K], [N] int64, [1] int32
    K, stride_w,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK)
    count = 0
    for index in range(row * tiles_k, (row + 1) * tiles_k):
        x, there = _tile(w_ptr, index, tiles_k, K, stride_w, scale_ptr, row_ptr, column_ptr, BLOCK, SCALE, SHARES)
        count += tl.sum((there & (x == tl.load(threshold_ptr))).to(tl.int32), 0)
    tl.store(out_ptr + row, count)


def upper_counts(scores: Scores) -> torch.Tensor:
    """How many scores begin with each of 16 bits: [2 ** 15] int64."""
    return _histogram(scores, 1 << 15, torch.zeros(1, dtype=torch.int64, device=scores.weight.device))


def lower_counts(scores: Scores, top: torch.Tensor) -> torch.Tensor:
    """How many of those that begin with `top` end with each of 16 bits: [2 ** 16] int64."""
    return _histogram(scores, 1 << 16, top)


def equal_counts(scores: Scores, bits: torch.Tensor) -> torch.Tensor:
    """[N] int64, how many scores of every row have the bits [1] int32."""
    weight, (N, K) = scores.weight, scores.weight.shape
    pointers, flags = arguments(scores)
    out = torch.empty(N, dtype=torch.int64, device=weight.device)
    with torch.cuda.device_of(weight):
        _equal_kernel[(N,)](
            weight, out, bits, *pointers, K, weight.stride(0), BLOCK=_block(K), **flags, num_warps=NUM_WARPS
        )
    return out


def total(scores: Scores) -> torch.Tensor:
    """The sum of the scores, float64."""
    return _total(scores, torch.zeros(1, device=scores.weight.device), False)


def above(scores: Scores, threshold: torch.Tensor) -> torch.Tensor:
    """How many scores are above `threshold` float32, exactly, as float64."""
    return _total(scores, threshold.to(scores.weight.device), True)


def _histogram(scores: Scores, bins: int, top: torch.Tensor) -> torch.Tensor:
    weight, (programs, grid) = scores.weight, _grid(scores.weight)
    pointers, flags = arguments(scores)
    counts = torch.zeros(COPIES, bins, dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        _histogram_kernel[(programs,)](
            weight, counts, top, *pointers, *grid,
            BLOCK=_block(weight.shape[1]), BINS=bins, COPIES=COPIES, LOWER=bins > 1 << 15, **flags, num_warps=NUM_WARPS,
        )  # fmt: skip
    return counts.sum(0)


def _total(scores: Scores, threshold: torch.Tensor, above: bool) -> torch.Tensor:
    weight, (programs, grid) = scores.weight, _grid(scores.weight)
    pointers, flags = arguments(scores)
    out = torch.empty(programs, dtype=torch.float64, device=weight.device)
    with torch.cuda.device_of(weight):
        _total_kernel[(programs,)](
            weight, out, threshold, *pointers, *grid,
            BLOCK=_block(weight.shape[1]), ABOVE=above, **flags, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out.sum()


def _block(K: int) -> int:
    return min(BLOCK, triton.next_power_of_2(K))


def _grid(weight: torch.Tensor) -> tuple[int, tuple[int, int, int, int]]:
    """Programs, and what they share: tiles, tiles of a row, K and the stride of rows."""
    N, K = weight.shape
    tiles_k = triton.cdiv(K, _block(K))
    return min(N * tiles_k, multiprocessors(weight.device) * RESIDENT), (N * tiles_k, tiles_k, K, weight.stride(0))
