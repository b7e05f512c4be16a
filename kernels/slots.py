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
BLOCK = 512  # columns at a time, one warp
TILE_ROWS, TILE = 128, 32  # rows of a chunk, below 256, and octets of columns whose slots one program counts
SLOTS = 32  # of a lane at a time


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _profile_kernel(
    w_ptr, bits_ptr, length_ptr, last_ptr, marks_ptr,  # integer [N, K]; [N, OCTETS] uint8, [N], [N] int32, [N, MARKS]
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
    TILE_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    nth = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]  # row of the chunk
    at = tl.program_id(2) * CHUNK + nth
    there = (nth < CHUNK) & (at < N)
    row = tl.load(order_ptr + at, mask=there, other=0).to(tl.int64)
    last = tl.load(last_ptr + row, mask=there, other=-1)
    octet = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    bits = tl.load(bits_ptr + row * OCTETS + octet, mask=octet * 8 <= last, other=0).to(tl.int32)
    bits &= (2 << tl.minimum(tl.maximum(last - octet * 8, 0), 7)) - 1  # those up to the last nonzero
    low = tl.sum(((bits & 15) * 0x204081) & 0x1010101, 0)  # [TILE], a count to a byte
    high = tl.sum(((bits >> 4) * 0x204081) & 0x1010101, 0)
    col = (tl.program_id(0) * TILE + tl.arange(0, TILE)) * 8
    to = spread_ptr + tl.program_id(2).to(tl.int64) * K + col
    for j in tl.static_range(4):
        tl.atomic_add(to + j, (low >> (8 * j)) & 255, mask=col + j < K)
        tl.atomic_add(to + 4 + j, (high >> (8 * j)) & 255, mask=col + 4 + j < K)


@triton.jit
def _columns_kernel(
    bits_ptr, last_ptr, first_ptr, columns_ptr,  # [N, OCTETS], [N], [N + 1]; [slots] int16 or int32
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
        to = columns_ptr + before + tl.cumsum(slot, 0) - 1
        tl.store(to, col.to(columns_ptr.dtype.element_ty), mask=slot != 0)
        before += tl.sum(slot)


@triton.jit
def _up_to(p, key, size):
    """How many of the first `size` numbers at p [S], which ascend, are not above the key [S]."""
    low = tl.zeros_like(key)
    high = low + size
    left = size
    while left > 0:
        middle = (low + high) // 2
        below = (low < high) & (tl.load(p + middle, mask=low < high, other=0) <= key)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
        left = left // 2
    return low


@triton.jit
def _cut_kernel(
    columns_ptr, first_ptr, order_ptr, spread_ptr, pairs_ptr, begin_ptr,  # spread sums [chunks, K]; begin [N, S + 1] int32
    K, CHUNK,
    R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(order_ptr + at)
    first = tl.load(first_ptr + row)
    length = (tl.load(first_ptr + row + 1) - first).to(tl.int32)
    room = 2 * (tl.load(pairs_ptr + at // R + 1) - tl.load(pairs_ptr + at // R))
    segment = tl.arange(0, S)
    spread = spread_ptr + at // CHUNK * K
    share = (segment * tl.load(spread + K - 1) + S - 1) // S  # slots of the chunk before a segment
    edge = _up_to(spread, share, K)  # where it begins, the first excepted
    wanted = _up_to(columns_ptr + first, edge.to(tl.int32) - 1, length)
    begin = 0
    begins = tl.zeros([S], tl.int32)
    for s in range(1, S):
        least = tl.maximum(begin, length - (S - s) * room)
        begin = tl.minimum(
            tl.maximum(tl.sum(tl.where(segment == s, wanted, 0)), least), tl.minimum(begin + room, length)
        )
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
    """[N, K] contiguous, of an integer dtype -> bits [N, ceil(K / 8)], last nonzero or -1 [N], slots [N], nonzeros [N, marks]."""
    N, K = weight.shape
    bits = torch.empty(N, -(-K // 8), dtype=torch.uint8, device=weight.device)
    last = torch.empty(N, dtype=torch.int32, device=weight.device)
    length = torch.empty(N, dtype=torch.int64, device=weight.device)
    count = torch.empty(N, marks, dtype=torch.int64, device=weight.device)
    with torch.cuda.device_of(weight):
        _profile_kernel[(N,)](
            weight, bits, length, last, count, K, bits.shape[1], MARKS=marks, BLOCK=BLOCK, num_warps=1
        )
    return bits, last, length, count


def fill(
    weight: torch.Tensor, bits: torch.Tensor, last: torch.Tensor, first: torch.Tensor, slots: int,
    order: torch.Tensor, pairs: torch.Tensor, steps: torch.Tensor, chunk: int, rows: int, segments: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The weight, what `profile` gave and the slots before each row [N + 1], `slots` in all -> values, gaps, bases.

    order [N], pairs [G + 1] and steps [G + 1] are those of the Sell; `chunk` rows share the columns at which segments want to begin.
    """
    N, K = weight.shape
    device, L, G = weight.device, rows * segments, -(-N // rows)
    index = torch.int16 if K <= 2**15 else torch.int32
    columns = torch.empty(slots, dtype=index, device=device)
    spread = torch.zeros(-(-N // chunk), K, dtype=torch.int32, device=device)
    begin = torch.empty(N, segments + 1, dtype=torch.int32, device=device)
    bases = torch.empty(G * L, dtype=index, device=device)
    octets, lanes = bits.shape[1], min(32, L)
    with torch.cuda.device_of(weight):
        _columns_kernel[(N,)](bits, last, first, columns, K, octets, BLOCK=BLOCK, num_warps=1)
        grid = triton.cdiv(octets, TILE), triton.cdiv(min(N, chunk), TILE_ROWS), len(spread)
        _spread_kernel[grid](
            bits, last, order, spread, N, K, octets, chunk, TILE_ROWS=TILE_ROWS, TILE=TILE, num_warps=4
        )
        _cut_kernel[(N,)](
            columns, first, order, spread.cumsum(1), pairs, begin, K, chunk, R=rows, S=segments, num_warps=1
        )
        total_pairs, total_steps = torch.stack([pairs[-1], steps[-1]]).tolist()
        values = torch.empty(2 * L * total_pairs, dtype=weight.dtype, device=device)
        gaps = torch.empty(L * total_steps, dtype=torch.int32, device=device)
        _fill_kernel[G, L // lanes](
            weight, columns, first, order, begin, pairs, steps, values, gaps, bases,
            N, K, R=rows, S=segments, LANES=lanes, SLOTS=SLOTS, num_warps=4,
        )  # fmt: skip
    return values, gaps, bases
