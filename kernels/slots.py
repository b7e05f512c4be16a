"""A dense weight to sliced ELLPACK with 4-bit gaps on the GPU: see formats/sell.py for the layout.

Which columns of a row take a slot does not depend on the lanes: those a multiple of 15 past the nonzero at or before them, up to the
last nonzero of the row. That is the nonzeros, 0 past themselves, and the fillers. So:

    profile  weight -> a bit for every slot; slots, nonzeros up to each mark and last nonzero of every row
    spread   bits -> slots in each column, for every chunk of rows
    columns  bits -> columns of the slots, row by row
    cut      columns -> the slot at which each lane begins
    fill     columns, weight -> values, gaps, bases; the weight holds +0.0 where a filler stands, so it gives all values

The weight is read twice. Extra memory: a bit for every weight and 2 bytes for every slot, 4 past 2**15 columns. Values travel as
integers of their width.
"""

import torch
import triton
import triton.language as tl

FAR = tl.constexpr(15)  # the largest distance between two slots
BLOCK = 1024  # columns at a time, one warp
TILE_ROWS, TILE_COLS = 32, 256  # of a chunk, whose slots a program counts
SLOTS = 64  # of a lane at a time


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _profile_kernel(
    w_ptr, bits_ptr, length_ptr, last_ptr, marks_ptr,  # integer [N, K]; [N, OCTETS] uint8, [N], [N], [N, MARKS] int64
    K, OCTETS,
    MARKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    last, length, count = -1, 0, 0
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        keep = tl.load(w_ptr + row * K + col, mask=col < K, other=0) != 0
        for mark in range(start * MARKS // K, tl.minimum((start + BLOCK) * MARKS // K, MARKS)):
            here = keep & (col * MARKS < (mark + 1) * K)
            tl.store(marks_ptr + row * MARKS + mark, count + tl.sum(here.to(tl.int32)))
        count += tl.sum(keep.to(tl.int32))
        nearest = tl.maximum(tl.associative_scan(tl.where(keep, col, -1), 0, _larger), last)
        slot = ((nearest >= 0) & ((col - nearest) % FAR == 0) & (col < K)).to(tl.int32)
        octet = start // 8 + tl.arange(0, BLOCK // 8)
        bits = tl.sum(tl.reshape(slot, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], 1)
        tl.store(bits_ptr + row * OCTETS + octet, bits.to(tl.uint8), mask=octet < OCTETS)
        length += tl.sum(slot)
        last = tl.max(nearest, 0)
    tl.store(length_ptr + row, length - tl.where(last < 0, 0, (K - 1 - last) // FAR))
    tl.store(last_ptr + row, last)


@triton.jit
def _spread_kernel(
    bits_ptr, last_ptr, order_ptr, spread_ptr,  # [N, OCTETS], [N], [N]; [chunks, K] int32
    N, K, OCTETS, CHUNK,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    nth = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]  # row of the chunk
    at = tl.program_id(2) * CHUNK + nth
    there = (nth < CHUNK) & (at < N)
    row = tl.load(order_ptr + at, mask=there, other=0).to(tl.int64)
    last = tl.load(last_ptr + row, mask=there, other=-1)
    col = tl.program_id(0) * TILE_COLS + tl.arange(0, TILE_COLS)[None, :]
    octet = tl.load(bits_ptr + row * OCTETS + col // 8, mask=col <= last, other=0).to(tl.int32)
    count = tl.sum((octet >> (col % 8)) & 1, 0)  # [TILE_COLS]
    col = tl.program_id(0) * TILE_COLS + tl.arange(0, TILE_COLS)
    tl.atomic_add(spread_ptr + tl.program_id(2).to(tl.int64) * K + col, count, mask=col < K)


@triton.jit
def _columns_kernel(
    bits_ptr, last_ptr, first_ptr, columns_ptr,  # [N, OCTETS], [N], [N]; [slots] int16 or int32
    K, OCTETS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(first_ptr + row)
    last = tl.load(last_ptr + row)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        octet = tl.load(bits_ptr + row * OCTETS + col // 8, mask=col <= last, other=0).to(tl.int32)
        slot = (octet >> (col % 8)) & 1
        at = before + tl.cumsum(slot, 0) - 1
        tl.store(columns_ptr + at, col.to(columns_ptr.dtype.element_ty), mask=slot != 0)
        before += tl.sum(slot)


@triton.jit
def _cut_kernel(
    columns_ptr, first_ptr, length_ptr, order_ptr, edges_ptr, pairs_ptr, begin_ptr,  # begin [N, S + 1] int32, from first
    K, CHUNK,
    R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(order_ptr + at)
    first = tl.load(first_ptr + row)
    length = tl.load(length_ptr + row).to(tl.int32)
    room = 2 * (tl.load(pairs_ptr + at // R + 1) - tl.load(pairs_ptr + at // R))
    segment = tl.arange(0, S)
    edge = tl.load(edges_ptr + at // CHUNK * S + segment)
    low, high = tl.zeros([S], tl.int32), tl.zeros([S], tl.int32) + length
    left = K
    while left > 0:  # search for the first slot at the edge or past it
        middle = (low + high) // 2
        less = tl.load(columns_ptr + first + middle, mask=low < high, other=0) < edge
        less = less & (low < high)
        high = tl.where(less, high, middle)
        low = tl.where(less, middle + 1, low)
        left = left // 2
    begin = 0
    begins = tl.zeros([S], tl.int32)
    for s in range(1, S):
        wanted = tl.sum(tl.where(segment == s, low, 0))
        wanted = tl.maximum(wanted, tl.maximum(begin, length - (S - s) * room))
        begin = tl.minimum(wanted, tl.minimum(begin + room, length))
        begins = tl.where(segment == s, begin, begins)
    tl.store(begin_ptr + at * (S + 1) + segment, begins)
    tl.store(begin_ptr + at * (S + 1) + S, length)


@triton.jit
def _fill_kernel(
    w_ptr, columns_ptr, first_ptr, order_ptr, begin_ptr, pairs_ptr, steps_ptr,
    values_ptr, gaps_ptr, bases_ptr,
    N, K,
    R: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = R * S
    block = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]  # [1, LANES]
    pairs_before = tl.load(pairs_ptr + block).to(tl.int64)
    steps_before = tl.load(steps_ptr + block).to(tl.int64)
    pairs = (tl.load(pairs_ptr + block + 1) - pairs_before).to(tl.int32)
    at = block * R + lane % R
    row = tl.load(order_ptr + at, mask=at < N, other=0).to(tl.int64)
    begin = tl.load(begin_ptr + at * (S + 1) + lane // R, mask=at < N, other=0)
    count = tl.load(begin_ptr + at * (S + 1) + lane // R + 1, mask=at < N, other=0) - begin
    columns = columns_ptr + tl.load(first_ptr + row) + begin
    base = tl.load(columns, mask=count > 0, other=0)
    tl.store(bases_ptr + block * L + lane, base)
    for start in range(0, 2 * pairs, SLOTS):
        slot = start + tl.arange(0, SLOTS)[:, None]  # [SLOTS, 1]
        there = slot < count
        col = tl.load(columns + slot, mask=there, other=0).to(tl.int32)
        before = tl.load(columns + slot - 1, mask=there & (slot > 0), other=0).to(tl.int32)
        gap = tl.where(there & (slot > 0), col - before, 0) << (slot % 8 * 4)
        value = tl.load(w_ptr + row * K + col, mask=there, other=0)
        within = tl.where(
            slot // 8 * 4 + 4 <= pairs, lane * 8 + slot % 8, slot % 8 // 2 * (2 * L) + lane * 2 + slot % 2
        )
        to = values_ptr + (pairs_before + slot // 8 * 4) * (2 * L) + within
        tl.store(to, value, mask=(slot < 2 * pairs) & (lane >= 0))
        word = tl.sum(tl.reshape(gap, (SLOTS // 8, 8, LANES)), 1)  # [SLOTS / 8, LANES]
        step = start // 8 + tl.arange(0, SLOTS // 8)[:, None]
        tl.store(gaps_ptr + (steps_before + step) * L + lane, word, mask=(step * 4 < pairs) & (lane >= 0))


def profile(weight: torch.Tensor, marks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] contiguous, of an integer dtype -> bits [N, ceil(K / 8)], slots [N], nonzeros [N, marks], last nonzero or -1 [N]."""
    N, K = weight.shape
    bits = torch.empty(N, -(-K // 8), dtype=torch.uint8, device=weight.device)
    length = torch.empty(N, dtype=torch.int64, device=weight.device)
    last = torch.empty(N, dtype=torch.int32, device=weight.device)
    count = torch.empty(N, marks, dtype=torch.int64, device=weight.device)
    with torch.cuda.device_of(weight):
        _profile_kernel[(N,)](
            weight, bits, length, last, count, K, bits.shape[1], MARKS=marks, BLOCK=BLOCK, num_warps=1
        )
    return bits, length, count, last


def spread(bits: torch.Tensor, last: torch.Tensor, order: torch.Tensor, chunk: int, K: int) -> torch.Tensor:
    """The bits, and `chunk` rows at a time in order [N] -> slots in each column [chunks, K]."""
    N = order.numel()
    chunks = -(-N // chunk)
    out = torch.zeros(chunks, K, dtype=torch.int32, device=bits.device)
    grid = triton.cdiv(K, TILE_COLS), triton.cdiv(min(N, chunk), TILE_ROWS), chunks
    with torch.cuda.device_of(bits):
        _spread_kernel[grid](
            bits, last, order, out, N, K, bits.shape[1], chunk, TILE_ROWS=TILE_ROWS, TILE_COLS=TILE_COLS, num_warps=4
        )
    return out


def fill(
    weight: torch.Tensor, bits: torch.Tensor, length: torch.Tensor, last: torch.Tensor, slots: int,
    order: torch.Tensor, edges: torch.Tensor, pairs: torch.Tensor, steps: torch.Tensor, totals: tuple[int, int],
    chunk: int, rows: int, segments: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """What `profile` gave, and for each chunk the columns at which segments want to begin [chunks, S] -> values, gaps, bases.

    `slots` is the sum of length, `totals` the last of pairs [G + 1] and of steps [G + 1].
    """
    N, K = weight.shape
    device, L, G = weight.device, rows * segments, -(-N // rows)
    index = torch.int16 if K <= 2**15 else torch.int32
    first = length.cumsum(0) - length
    columns = torch.empty(slots, dtype=index, device=device)
    begin = torch.empty(N, segments + 1, dtype=torch.int32, device=device)
    values = torch.empty(2 * L * totals[0], dtype=weight.dtype, device=device)
    gaps = torch.empty(L * totals[1], dtype=torch.int32, device=device)
    bases = torch.empty(G * L, dtype=index, device=device)
    lanes = min(32, L)
    with torch.cuda.device_of(weight):
        _columns_kernel[(N,)](bits, last, first, columns, K, bits.shape[1], BLOCK=BLOCK, num_warps=1)
        _cut_kernel[(N,)](columns, first, length, order, edges, pairs, begin, K, chunk, R=rows, S=segments, num_warps=1)
        _fill_kernel[G, L // lanes](
            weight, columns, first, order, begin, pairs, steps, values, gaps, bases,
            N, K, R=rows, S=segments, LANES=lanes, SLOTS=SLOTS, num_warps=4,
        )  # fmt: skip
    return values, gaps, bases
