"""A dense weight to N:M on the GPU: see formats/nm.py for the layout.

Two reads of the weight. The first notes which weights are held, a bit each, and how many at most in a group of every size. The
second starts from the slots that are stored: the bits of a slot's group say which weight it holds, so that a slot is written once
and no thread waits for another. Values travel as integers of their width.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # columns at a time, one warp
SIZES = (4, 8, 16, 32)  # m
SLOTS = 64  # of a lane


@triton.jit
def _bits_kernel(
    w_ptr, words_ptr, fullest_ptr,  # [N, K] integer, [N, WORDS] int32, [4, N] int32
    N, K, WORDS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    four, eight, sixteen, most = 0, 0, 0, 0
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        keep = (tl.load(w_ptr + row * K + col, mask=col < K, other=0) != 0).to(tl.int32)
        bits = tl.reshape(keep, (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
        word = start // 32 + tl.arange(0, BLOCK // 32)
        tl.store(words_ptr + row * WORDS + word, tl.sum(bits, 1), mask=word < WORDS)
        held = tl.sum(tl.reshape(keep, (BLOCK // 4, 4)), 1)
        four = tl.maximum(four, tl.max(held, 0))
        held = tl.sum(tl.reshape(held, (BLOCK // 8, 2)), 1)
        eight = tl.maximum(eight, tl.max(held, 0))
        held = tl.sum(tl.reshape(held, (BLOCK // 16, 2)), 1)
        sixteen = tl.maximum(sixteen, tl.max(held, 0))
        held = tl.sum(tl.reshape(held, (BLOCK // 32, 2)), 1)
        most = tl.maximum(most, tl.max(held, 0))
    tl.store(fullest_ptr + row, four)
    tl.store(fullest_ptr + N + row, eight)
    tl.store(fullest_ptr + 2 * N + row, sixteen)
    tl.store(fullest_ptr + 3 * N + row, most)


@triton.jit
def _ones(bits, m: tl.constexpr):
    """How many of the lowest m bits are set; the others are zero."""
    bits -= (bits >> 1) & 0x55555555
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    if m > 4:
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    if m > 8:
        bits += bits >> 8
    if m > 16:
        bits += bits >> 16
    return bits & 63


@triton.jit
def _slots_kernel(
    w_ptr, words_ptr, values_ptr, codes_ptr,
    N, K, WORDS, steps,
    n: tl.constexpr, m: tl.constexpr, V: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    BITS: tl.constexpr = 32 // V
    C: tl.constexpr = V if V < 8 else 8
    GROUP: tl.constexpr = (1 << m) - 1 if m < 32 else -1
    block = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]  # [1, LANES]
    row = block * R + lane % R
    slot = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)[:, None]  # [SLOTS, 1] of the lane
    nth = lane // R * (steps * V) + slot  # of the row
    col = nth // n * m
    there = (row < N) & (col < K)
    held = (tl.load(words_ptr + row * WORDS + col // 32, mask=there, other=0) >> (col % 32)) & GROUP
    lacks = n - _ones(held, m)
    for i in tl.static_range(n):  # a group that holds fewer also stores its first zeros
        held |= tl.where(i < lacks, ~held & (held + 1), 0)
    for i in tl.static_range(n - 1):
        held = tl.where(i < nth % n, held & (held - 1), held)
    code = tl.where(there, _ones((held & -held) - 1, m), 0)
    stored = (slot < steps * V) & (lane >= 0)
    value = tl.load(w_ptr + row * K + col + code, mask=there & stored & (col + code < K), other=0)
    step = block * steps + slot // V
    at = (step * (V // C) + slot % V // C) * (L * C) + lane * C + slot % C
    tl.store(values_ptr + at, value, mask=stored)
    word = tl.sum(tl.reshape(code << (slot % V * BITS), (SLOTS // V, V, LANES)), 1)
    step = tl.program_id(2) * (SLOTS // V) + tl.arange(0, SLOTS // V)[:, None]  # [SLOTS / V, 1] of the lane
    tl.store(codes_ptr + (block * steps + step) * L + lane, word, mask=(step < steps) & (lane >= 0))


def count(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] contiguous, of an integer dtype -> a bit for every weight held [N, ceil(K / 32)], most held in a group of SIZES [4]."""
    N, K = weight.shape
    words = torch.empty(N, -(-K // 32), dtype=torch.int32, device=weight.device)
    fullest = torch.empty(len(SIZES), N, dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        _bits_kernel[(N,)](weight, words, fullest, N, K, words.shape[1], BLOCK=BLOCK, num_warps=1)
    return words, fullest.amax(1)


def pack(
    weight: torch.Tensor, words: torch.Tensor, n: int, m: int, rows: int, segments: int, step: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and its bits -> values and codes of an NM."""
    N, K = weight.shape
    blocks, L = -(-N // rows), rows * segments
    values = torch.empty(blocks * steps * L * step, dtype=weight.dtype, device=weight.device)
    codes = torch.empty(blocks * steps * L, dtype=torch.int32, device=weight.device)
    lanes = min(32, L)
    with torch.cuda.device_of(weight):
        _slots_kernel[blocks, L // lanes, triton.cdiv(steps * step, SLOTS)](
            weight, words, values, codes,
            N, K, words.shape[1], steps, n=n, m=m, V=step, R=rows, S=segments, LANES=lanes, SLOTS=SLOTS, num_warps=4,
        )  # fmt: skip
    return values, codes
