"""Score, select and zero in one read and one write of the weight: the smallest scores of every group of columns go.

Ties go by column, so the result is that of a stable sort. A group is a row, a block of a row, or the m of an N:M pattern.

Small groups: a score's rank is the number of scores in its group that come before it.

Other groups: search the int32 bit pattern, which orders as the scores do, for a T with as many scores below it as have to go. The scores
stay in registers, and a step counts those below a pivot. The first pivot is where the program's last group ended: neighbours
have like scores, so the search leaves it by as many octaves as the count is off (SLOPE is their usual number for a whole group), until T
is enclosed, and then interpolates, halving every fourth step. Whatever the pivots, it ends with T: about six steps on Wanda's scores.
If too many equal T, the first of them go.

A whole matrix: T comes from two histograms (census.py), and one more read says how many of those that equal it go from each row.
"""

import torch
import triton
import triton.language as tl

from dlpkit.kernels import census
from dlpkit.kernels.ranks import ranks
from dlpkit.kernels.runtime import multiprocessors
from dlpkit.kernels.score import Scores
from dlpkit.kernels.statistics import locate
from dlpkit.kernels.terms import INFINITE, arguments, score_bits

RANKED = (2, 4, 8, 16, 32)  # group sizes that are ranked
RANK_TILE = 1024  # scores of a program of 4 warps
SMALL_TILE, SMALL_REGISTERS = 256, 64  # scores of a warp that searches several groups, registers of a thread
TILE, WARPS, REGISTERS = 2048, 8, 128  # the same for warps that search one group, and how many do at most
WARP_REGISTERS = 2048  # of a multiprocessor: it holds as many warps as that many registers of a thread each
LARGEST = tl.constexpr(0x7F7FFFFF)  # the bits of the largest finite number: padding, never before a score
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, the first pivot of a program
SLOPE, MARGIN = tl.constexpr(4.0), tl.constexpr(0.02)
OCTAVE = tl.constexpr(1 << 23)


@triton.jit
def _search(x, go, size, hint):
    """Bits x [R, B], padded with LARGEST; how many go [R] of how many [R] -> T and how many of those equal to it go, both [R]."""
    low, high = tl.where(go < size, 0, INFINITE + 1), tl.zeros_like(go) + INFINITE + 1
    below_low, below_high = tl.where(go < size, 0, size), size  # how many scores are below
    pivot = tl.minimum(tl.maximum(hint, 1), INFINITE)
    slope = SLOPE * OCTAVE / size.to(tl.float32)  # of the count, in bits
    step, turn = tl.zeros_like(go), 0
    searching = (below_low < go) & (low + 1 < high)
    while tl.max(searching.to(tl.int32), 0) > 0:
        signs = (x - pivot[:, None]).to(tl.uint32, bitcast=True) >> 31  # cheaper than comparisons
        below = tl.sum(signs.to(tl.int32), 1)
        up = below <= go
        low, below_low = tl.where(searching & up, pivot, low), tl.where(searching & up, below, below_low)
        high, below_high = tl.where(searching & ~up, pivot, high), tl.where(searching & ~up, below, below_high)
        off = tl.abs(go - below).to(tl.float32) * slope + MARGIN * OCTAVE
        step = tl.maximum(off.to(tl.int32), tl.minimum(2 * step, 1 << 28))
        leave = tl.where(up, pivot + tl.minimum(step, high - pivot), pivot - tl.minimum(step, pivot - low))
        root = tl.rsqrt(tl.maximum(below_high - below_low, 1).to(tl.float32))  # its square is cheaper than a division
        part = tl.where(turn % 4 == 3, 0.5, (go - below_low).to(tl.float32) * root * root)
        enclosed = (low > 0) & (high <= INFINITE)
        pivot = tl.where(enclosed, low + ((high - low).to(tl.float32) * part).to(tl.int32), leave)
        pivot = tl.maximum(low + 1, tl.minimum(pivot, high - 1))
        searching = (below_low < go) & (low + 1 < high)
        turn += 1
    return low, go - below_low


@triton.jit
def _settle(x, member, threshold, equal, BLOCK: tl.constexpr):
    """Bits x [R, B], their numbers in the group [1, B], T [R], how many of those equal to it go [R] -> x with these below T."""
    if tl.max(equal, 0) > 0:
        first, end = tl.zeros_like(equal), tl.where(equal > 0, BLOCK, 0)  # where those that stay begin: a search again
        while tl.max(end - first, 0) > 0:
            middle = (first + end) // 2
            enough = tl.sum(((x == threshold[:, None]) & (member < middle[:, None])).to(tl.int32), 1) >= equal
            first, end = tl.where(enough, first, middle + 1), tl.where(enough, middle, end)
        x = tl.where((x == threshold[:, None]) & (member < first[:, None]), x - 1, x)
    return x


@triton.jit
def _put(out_ptr, w, stays, there, MASK: tl.constexpr):
    if not MASK:
        stays = tl.where(stays, w, 0.0)
    tl.store(out_ptr, stays, mask=there)


@triton.jit
def _check(x, bad_ptr):
    if tl.max(tl.ravel(x.to(tl.uint32, bitcast=True)), 0) >= INFINITE:
        tl.store(bad_ptr, 1)


@triton.jit
def _search_kernel(
    w_ptr, out_ptr, bad_ptr, scale_ptr, row_ptr, column_ptr,  # [N, K], [N, K], [1] int32, [K], [N], [K]
    groups, K, stride_w, stride_out, go, last,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, FULL: tl.constexpr,
    MASK: tl.constexpr, SCALE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    count = (K + SIZE - 1) // SIZE  # groups of a row
    member = tl.arange(0, BLOCK)[None, :]
    hint = tl.full([R], ONE, tl.int32)
    for first in range(tl.program_id(0) * R, groups, tl.num_programs(0) * R):
        group = first + tl.arange(0, R)  # [R]
        row = (group // count)[:, None].to(tl.int64)
        start = group % count * SIZE  # its first column
        col = start[:, None] + member
        inside = (member < SIZE) & (col < K) & (group < groups)[:, None]
        there = tl.full([R, BLOCK], True, tl.int1) if FULL else inside
        w = tl.load(w_ptr + row * stride_w + col, mask=there, other=0.0)
        x = score_bits(w, row, col, there, scale_ptr, row_ptr, column_ptr, SCALE, SHARES)
        x = tl.where(there, x, LARGEST)
        _check(x, bad_ptr)
        size = tl.minimum(K - start, SIZE)
        goes = tl.where(group < groups, tl.where(size == SIZE, go, last), 0)
        hint, equal = _search(x, goes, size, hint)
        x = _settle(x, member, hint, equal, BLOCK)
        # read again, from cache: kept during the search it would take registers that scores need
        w = tl.load(w_ptr + row * stride_w + col, mask=there, other=0.0, eviction_policy="evict_first")
        _put(out_ptr + row * stride_out + col, w, x >= hint[:, None], there, MASK)


@triton.jit
def _rank_kernel(
    w_ptr, out_ptr, bad_ptr, scale_ptr, row_ptr, column_ptr,
    K, stride_w, stride_out, go,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + row * stride_w + col, mask=col < K, other=0.0)
    x = score_bits(w, row, col, col < K, scale_ptr, row_ptr, column_ptr, SCALE, SHARES)
    _check(x, bad_ptr)
    stays = tl.reshape(ranks(tl.reshape(x, (BLOCK // SIZE, SIZE)), SIZE), (BLOCK,)) >= go
    _put(out_ptr + row * stride_out + col, w, stays, col < K, MASK)


@triton.jit
def _threshold_kernel(
    w_ptr, out_ptr, threshold_ptr, equal_ptr, scale_ptr, row_ptr, column_ptr,  # T [1] int32; [N] how many equal to it go
    K, stride_w, stride_out,
    BLOCK: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(threshold_ptr + tl.arange(0, 1))
    equal = tl.load(equal_ptr + row + tl.arange(0, 1))
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        w = tl.load(w_ptr + row * stride_w + col, mask=col < K, other=0.0)
        x = score_bits(w, row, col, col < K, scale_ptr, row_ptr, column_ptr, SCALE, SHARES)
        x = tl.where(col < K, x, LARGEST)
        count = tl.sum((x == threshold[:, None]).to(tl.int32), 1)
        x = _settle(x, col - start, threshold, tl.minimum(equal, count), BLOCK)
        _put(out_ptr + row * stride_out + col, w, x >= threshold[:, None], col < K, MASK)
        equal = tl.maximum(equal - count, 0)


def groups(scores: Scores, out: torch.Tensor, size: int, go: int, last: int) -> torch.Tensor:
    """Zero out of `out`, which is the weight or a bool [N, K], the `go` smallest of every `size` columns -> [1], not 0 for bad scores."""
    weight, (N, K) = scores.weight, scores.weight.shape
    pointers, flags = arguments(scores)
    flags["MASK"] = out.dtype == torch.bool
    bad = torch.zeros(1, dtype=torch.int32, device=weight.device)
    strides = weight.stride(0), out.stride(0)
    with torch.cuda.device_of(weight):
        if size in RANKED:
            block = min(RANK_TILE, triton.next_power_of_2(K))
            _rank_kernel[N, triton.cdiv(K, block)](
                weight, out, bad, *pointers, K, *strides, go, SIZE=size, BLOCK=block, **flags, num_warps=block // 256 or 1
            )  # fmt: skip
        else:
            block, count = triton.next_power_of_2(size), N * -(-K // size)
            warps, R = min(WARPS, max(1, block // TILE)), max(1, SMALL_TILE // block)
            registers = REGISTERS if block >= TILE else SMALL_REGISTERS
            resident = multiprocessors(weight.device) * max(1, WARP_REGISTERS // registers // warps)
            _search_kernel[(min(triton.cdiv(count, R), resident),)](
                weight, out, bad, *pointers, count, K, *strides, go, last,
                SIZE=size, BLOCK=block, R=R, FULL=block == size and K % size == 0 and count % R == 0, **flags,
                num_warps=warps, maxnreg=registers,
            )  # fmt: skip
    return bad


def matrix(scores: Scores, out: torch.Tensor, go: int) -> torch.Tensor:
    """The same for the `go` smallest scores of the whole matrix."""
    weight, (N, K) = scores.weight, scores.weight.shape
    upper = census.upper_counts(scores)
    bad = upper[INFINITE.value >> 16 :].sum()
    rank = torch.tensor(min(go, N * K - 1), device=weight.device)
    top, before = locate(upper, rank)
    low, rest = locate(census.lower_counts(scores, top), rank - before)
    threshold = (top << 16 | low).int().view(1)
    equal = census.equal_counts(scores, threshold)
    goes = (go - before - rest) - (equal.cumsum(0) - equal)  # those equal to T that go from this row and later ones
    goes = goes.clamp_min(0).minimum(equal).int()
    pointers, flags = arguments(scores)
    with torch.cuda.device_of(weight):
        _threshold_kernel[(N,)](
            weight, out, threshold, goes, *pointers, K, weight.stride(0), out.stride(0),
            BLOCK=min(RANK_TILE, triton.next_power_of_2(K)), MASK=out.dtype == torch.bool, **flags, num_warps=4,
        )  # fmt: skip
    return bad
