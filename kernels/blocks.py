"""A dense weight to blocks of 64 rows and 256 columns and back on the GPU: see formats/tile.py for the layout.

A run is walked through the columns c of a block from both ends; in column c, run r has the weight of row r ^ (c % 8 * 8). How many slots
a weight takes from either side follows from the weights before and after it: scans along the run give every weight its lane and
slot at once. The first pass counts the weights by the steps they need and picks the steps of each block, the second writes. Values travel as
integers of their width.
"""

import torch
import triton
import triton.language as tl

RUNS = 8  # at a time
FAR = tl.constexpr(15)  # the largest distance between two slots
MOST = tl.constexpr(32)  # more steps than any block needs
STEP_BYTES, EXTRA_BYTES = tl.constexpr(2560), tl.constexpr(4)  # with 16-bit values


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _where(run, block, c, B):
    """Row and column of the weight that a run of a block has in its column c."""
    return block // B * 64 + (run ^ (c & 7) * 8), block % B * 256 + c


@triton.jit
def _load(w_ptr, run, block, c, N, K, B):
    """The weights of runs [RUNS, 1] in columns c [1, 256]; zero where there is none."""
    row, column = _where(run, block, c, B)
    there = (row < N) & (column < K) & (c >= 0) & (c < 256)
    return tl.load(w_ptr + row.to(tl.int64) * K + column, mask=there, other=0)


@triton.jit
def _slots(w_ptr, run, block, c, N, K, B):
    """Of each weight: itself, whether it goes up, the distance to it and the slots that takes, and the slots of its lane up to it."""
    w = _load(w_ptr, run, block, c, N, K, B)
    keep = w != 0
    before = tl.associative_scan(tl.where(_load(w_ptr, run, block, c - 1, N, K, B) != 0, c - 1, 0), 1, _larger)
    after = tl.associative_scan(
        tl.where(_load(w_ptr, run, block, c + 1, N, K, B) != 0, c + 1, 255), 1, _smaller, reverse=True
    )
    up = c - before
    down = after - c
    slots_up = tl.where(keep, tl.maximum((up + FAR - 1) // FAR, 1), 0)
    slots_down = tl.where(keep, tl.maximum((down + FAR - 1) // FAR, 1), 0)
    until = tl.cumsum(slots_up, 1)
    since = tl.cumsum(slots_down, 1, reverse=True)
    upward = until <= since  # the longer end is as short as can be
    return w, upward, tl.where(upward, up, down), tl.where(upward, slots_up, slots_down), tl.where(upward, until, since)


@triton.jit
def _needs(w_ptr, block, c, N, K, B, RUNS: tl.constexpr):
    """[MOST] weights of a block by the steps that they need."""
    needs = tl.zeros([MOST], tl.int32)
    for start in range(0, 64, RUNS):
        run = start + tl.arange(0, RUNS)[:, None]
        w, _, _, _, nth = _slots(w_ptr, run, block, c, N, K, B)
        needs += tl.histogram(tl.reshape(tl.where(w != 0, (nth + 7) // 8, 0), (RUNS * 256,)), MOST)
    return tl.where(tl.arange(0, MOST) == 0, 0, needs)


@triton.jit
def _steps_kernel(
    w_ptr, steps_ptr, more_ptr,  # [N, K] integer, [blocks] int32 twice
    N, K, B, blocks,
    RUNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // B * 2 * B + tl.program_id(0) % B
    c = tl.arange(0, 256)[None, :]
    upper = _needs(w_ptr, block, c, N, K, B, RUNS)
    lower = _needs(w_ptr, block + B, c, N, K, B, RUNS)
    needs = upper + lower
    steps = tl.arange(0, MOST)
    halves = tl.where(block + B < blocks, 2, 1)  # the last 64 rows may have no others below
    bytes = (tl.cumsum(needs, 0, reverse=True) - needs) * EXTRA_BYTES + steps * (halves * STEP_BYTES)
    best = tl.argmin(bytes, 0)
    tl.store(steps_ptr + block, best)
    tl.store(more_ptr + block, tl.sum(tl.where(steps > best, upper, 0)))
    tl.store(steps_ptr + block + B, best, mask=block + B < blocks)
    tl.store(more_ptr + block + B, tl.sum(tl.where(steps > best, lower, 0)), mask=block + B < blocks)


@triton.jit
def _fill_kernel(
    w_ptr, starts_ptr, extra_starts_ptr, values_ptr, gaps_ptr, extras_ptr, places_ptr,  # values and gaps hold zeros
    N, K, B,
    RUNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first = tl.load(starts_ptr + block)
    slots = (tl.load(starts_ptr + block + 1) - first) * 8
    extras = tl.load(extra_starts_ptr + block)
    c = tl.arange(0, 256)[None, :]
    for start in range(0, 64, RUNS):
        run = start + tl.arange(0, RUNS)[:, None]
        w, upward, distance, count, nth = _slots(w_ptr, run, block, c, N, K, B)
        fits = (w != 0) & (nth <= slots)
        # padding comes first, so that the last slot of a lane is the last weight that fits
        longest_up = tl.max(tl.where(fits & upward, nth, 0), 1)[:, None]
        longest_down = tl.max(tl.where(fits & (upward == 0), nth, 0), 1)[:, None]
        slot = slots - tl.where(upward, longest_up, longest_down) + nth - 1
        lane = tl.where(upward, 0, 64) + run % 2 * 32 + run // 2
        at = (first + slot // 8).to(tl.int64) * 128 + lane
        tl.store(values_ptr + at * 8 + slot % 8, w, mask=fits)
        gap = distance - FAR * (count - 1)
        tl.atomic_add(gaps_ptr + at, gap << (slot % 4 * 8 + slot % 8 // 4 * 4), mask=fits & (gap > 0))
        for filler in range(1, tl.max(tl.where(fits, count, 0))):
            slot -= 1
            at = (first + slot // 8).to(tl.int64) * 128 + lane
            far = tl.full(slot.shape, FAR, tl.int32) << (slot % 4 * 8 + slot % 8 // 4 * 4)
            tl.atomic_add(gaps_ptr + at, far, mask=fits & (filler < count))
        extra = ((w != 0) & (nth > slots)).to(tl.int32)
        of_run = tl.sum(extra, 1)[:, None]
        to = extras + tl.cumsum(of_run, 0) - of_run + tl.cumsum(extra, 1) - 1
        tl.store(places_ptr + to, (c * 64 + run).to(tl.int16), mask=extra != 0)
        tl.store(extras_ptr + to, w, mask=extra != 0)
        extras += tl.sum(of_run)


@triton.jit
def _store(out_ptr, value, run, block, c, K, B, there):
    row, column = _where(run, block, c, B)
    tl.store(out_ptr + row.to(tl.int64) * K + column, value, mask=there)


@triton.jit
def _dense_kernel(
    values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, out_ptr,  # out [N, K] holds zeros
    N, K, B,
):  # fmt: skip
    block = tl.program_id(0)
    part = tl.program_id(1)
    lane = part * 16 + tl.arange(0, 16)[:, None]
    run = lane % 32 * 2 + lane % 64 // 32
    slot = tl.arange(0, 8)[None, :]
    walked = tl.zeros([16, 1], tl.int32)
    for step in range(tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)):
        at = step * 128 + lane.to(tl.int64)
        value = tl.load(values_ptr + at * 8 + slot)
        gap = (tl.load(gaps_ptr + at) >> (slot % 4 * 8 + slot // 4 * 4)) & FAR
        c = walked + tl.cumsum(gap, 1)
        walked += tl.sum(gap, 1)[:, None]
        c = tl.where(lane < 64, c, 255 - c)
        _store(out_ptr, value, run, block, c, K, B, value != 0)
    last = tl.load(extra_starts_ptr + block + 1)
    for start in range(tl.load(extra_starts_ptr + block) + part * 128, last, 8 * 128):
        extra = start + tl.arange(0, 128)
        place = tl.load(places_ptr + extra, mask=extra < last, other=-1).to(tl.int32)
        value = tl.load(extras_ptr + extra, mask=extra < last, other=0)
        _store(out_ptr, value, place % 64, block, place // 64, K, B, place >= 0)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[N, K] contiguous, of an integer dtype -> values, gaps, extras, places, starts and extra_starts of a Tile."""
    N, K = weight.shape
    B = -(-K // 256)
    blocks = -(-N // 64) * B
    counts = torch.empty(2, blocks, dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        _steps_kernel[(-(-N // 128) * B,)](weight, counts[0], counts[1], N, K, B, blocks, RUNS=RUNS, num_warps=4)
        counts[1] += -counts[1] % 4  # extras come in fours
        starts, extra_starts = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).to(torch.int32)
        steps, more = counts.sum(1).tolist()
        values = torch.zeros(steps * 1024, dtype=weight.dtype, device=weight.device)
        gaps = torch.zeros(steps * 128, dtype=torch.int32, device=weight.device)
        extras = torch.zeros(more, dtype=weight.dtype, device=weight.device)
        places = torch.full((more,), -1, dtype=torch.int16, device=weight.device)
        _fill_kernel[(blocks,)](
            weight, starts, extra_starts, values, gaps, extras, places, N, K, B, RUNS=RUNS, num_warps=4
        )
    return values, gaps, extras, places, starts, extra_starts


def dense(
    values: torch.Tensor, gaps: torch.Tensor, extras: torch.Tensor, places: torch.Tensor, starts: torch.Tensor,
    extra_starts: torch.Tensor, N: int, K: int,
) -> torch.Tensor:  # fmt: skip
    """The same, values and extras of an integer dtype -> [N, K]."""
    out = torch.zeros(N, K, dtype=values.dtype, device=values.device)
    with torch.cuda.device_of(out):
        _dense_kernel[starts.numel() - 1, 8](
            values, gaps, extras, places, starts, extra_starts, out, N, K, -(-K // 256), num_warps=4
        )
    return out
