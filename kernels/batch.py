"""y = x W^T + bias for a tile weight and up to 128 rows of x: some warps scatter nonzeros into shared memory while others multiply.

A unit is a tile of 128 rows by 256 columns. A program has a multiprocessor to itself and takes its units one after the other, all of a
tile before the next tile. Two groups of 8 warps each own a tile in shared memory, clear it and scatter every second unit into it; 4 warps
multiply, wgmma with both operands in shared memory, and store y; x comes by TMA, a piece of a block's columns at a time. `ready` says
that a piece is there, `full` that a tile holds its block, `empty` that one half of it or the other has been multiplied.

Rarely are there as many tiles as multiprocessors, so each tile has an owner, and its last blocks go to programs that only help: these
units are numbered on their own, through all tiles. Helpers come first in the grid: an owner waits for programs that have started. See
parts.py for how their sums come together.
"""

import functools
import operator
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dlpkit.kernels import parts
from dlpkit.kernels.early import early_start
from dlpkit.kernels.product import DTYPES, aligned, finish, grid
from dlpkit.kernels.runtime import multiprocessors
from dlpkit.kernels.scatter import (
    COLUMNS,
    barrier,
    clear,
    load_table,
    of_lane,
    put_first,
    put_rest,
    read_extras,
    start,
    walk,
    walker,
    zero_now,
)

FEWEST, MOST = 16, 128  # rows of x in a launch
ROWS = gl.constexpr(128)  # of a tile
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
STAGES = gl.constexpr(3)  # pieces of x in shared memory
# by rows of x: registers of a thread that scatters, those that multiply have the rest; chunks of 64 columns in a piece; units that adding
# the parts of a tile counts for. Chosen on an H100 by what benchmarks/tune_batch.py measured
REGISTERS = {16: 88, 32: 88, 64: 88, 128: 80}
CHUNKS = {16: 4, 32: 4, 64: 4, 128: 2}
JOIN = {16: 1, 32: 1, 64: 1, 128: 6}
DEPTHS, LONG = (6, 8), 7  # steps that a ring holds, the more where blocks have more on average
LATER = 4  # programs to a tile past which a kernel of its own adds their sums, as it always does for 128 rows


@gluon.jit
def _share(tiles, B, helpers, owned, lent, load):
    """A program's first unit and the one past its last; how many of a tile are its kind's, and the block of the first of these."""
    program = gl.program_id(0)
    helps = program < helpers
    width = gl.where(helps, lent, B - lent)
    count = gl.where(helps, load, owned * width)
    first = gl.where(helps, program, program - helpers) * count
    return first, gl.minimum(first + count, tiles * width), width, gl.where(helps, B - lent, 0)


@gluon.jit
def _begin(share):
    """Tile and block of a program's first unit, the block among those of its kind."""
    tile = share[0] // share[2]
    return tile, share[0] - tile * share[2]


@gluon.jit
def _next(cell, share):
    """Those of the unit after that one."""
    tile, block = cell
    over = block + 1 == share[2]
    return gl.where(over, tile + 1, tile), gl.where(over, 0, block + 1)


@gluon.jit
def _load_edges(starts_ptr, extra_starts_ptr, cell, share, atoms, B):
    """Where a unit's steps begin and end, and its extras, in the upper 64 rows and in the lower: one word to a lane."""
    tile = gl.minimum(cell[0], (atoms - 1) // 2)  # past the last unit one that is there: it gets no steps
    upper = tile * 2 * B + cell[1] + share[3]
    lower = gl.where(tile * 2 + 1 < atoms, upper + B, upper)  # without lower rows the upper ones again: never stored
    steps = load_table(starts_ptr + upper, 1), load_table(starts_ptr + lower, 0)
    return steps + (load_table(extra_starts_ptr + upper, 1), load_table(extra_starts_ptr + lower, 1))


@gluon.jit
def _edges(words, live):
    """First step in the upper rows and in the lower, as many steps in both; first extra and extras in the upper rows, in the lower ones."""
    zero = zero_now()
    upper, extra, lower_extra = of_lane(words[0], zero), of_lane(words[2], zero), of_lane(words[3], zero)
    steps = gl.where(live, of_lane(words[0], zero + 1) - upper, 0)
    more, lower_more = of_lane(words[2], zero + 1) - extra, of_lane(words[3], zero + 1) - lower_extra
    return upper, of_lane(words[1], zero), steps, extra, more, lower_extra, lower_more


@gluon.jit
def _of_half(edges, above):
    """Of a thread's half: first step, first extra, extras."""
    return gl.where(above, edges[0], edges[1]), gl.where(above, edges[3], edges[5]), gl.where(above, edges[4], edges[6])


@gluon.jit
def _scatter(
    full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, share, atoms, B,
    GROUP: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    lane, half, me = walker(gl.arange(0, 256, gl.BlockedLayout([1], [32], [8], [0])), GROUP)
    above = half == 0
    full = full.index(GROUP)
    first_unit, last = share[0] + GROUP, share[1]
    cell = _begin(share)
    if GROUP:
        cell = _next(cell, share)
    words = _load_edges(starts_ptr, extra_starts_ptr, cell, share, atoms, B)
    cell = _next(_next(cell, share), share)
    next_words = _load_edges(starts_ptr, extra_starts_ptr, cell, share, atoms, B)
    edges, next_edges = _edges(words, first_unit < last), _edges(next_words, first_unit + 2 < last)
    first, extra, more = _of_half(edges, above)
    weight = values_ptr, gaps_ptr
    at = first * 128 + lane
    ring = start(weight, at, edges[2], DEPTH)
    extras = read_extras(extras_ptr, places_ptr, extra, more, lane)
    cell = _next(_next(cell, share), share)
    words = _load_edges(starts_ptr, extra_starts_ptr, cell, share, atoms, B)
    phase = 1
    for unit in range(first_unit, last, 2):
        for part in gl.static_range(2):
            mbarrier.wait(empty.index(2 * GROUP + part), phase)
            clear(me, part, 8)
        barrier()
        most = gl.maximum(edges[4], edges[6])
        put_first(extras, most, me)
        next_first, next_extra, next_more = _of_half(next_edges, above)
        next_at = next_first * 128 + lane
        ring = walk(weight, at, ring, edges[2], next_at, next_edges[2], me)
        _, extra, more = _of_half(edges, above)
        put_rest(extras_ptr, places_ptr, extra, more, most, lane, me)
        fence_async_shared()
        barrier()
        mbarrier.arrive(full)
        phase ^= 1
        extras = read_extras(extras_ptr, places_ptr, next_extra, next_more, lane)
        edges, next_edges, at = next_edges, _edges(words, unit + 4 < last), next_at
        cell = _next(_next(cell, share), share)
        words = _load_edges(starts_ptr, extra_starts_ptr, cell, share, atoms, B)


@gluon.jit
def _fetch(xs, ready, x_desc, piece, block, live, PART: gl.constexpr, CHUNKS: gl.constexpr):
    """Copy a piece of x, the PART-th of a block's columns, to its stage, zeros where x has none; nothing if not live."""
    M: gl.constexpr = xs.shape[1]
    column = block * COLUMNS + PART * (64 * CHUNKS)
    stage = piece % STAGES
    mbarrier.expect(ready.index(stage), CHUNKS * M * 128, pred=live)
    for c in gl.static_range(CHUNKS):
        tma.async_copy_global_to_shared(
            x_desc, [0, column + 64 * c], ready.index(stage), xs.index(stage * CHUNKS + c), pred=live
        )


@gluon.jit
def _multiply(
    w, xs, ready, full, empty, x_desc, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, share, helpers, lent, load,
    CHUNKS: gl.constexpr, BIAS: gl.constexpr, SUM: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = xs.shape[1]
    PIECES: gl.constexpr = 4 // CHUNKS  # of a unit
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    first_unit, last, width, offset = share
    grid("launch_dependents", EARLY)  # at once: what starts early finds only the multiprocessors that are idle
    grid("wait", EARLY)
    cell = _begin(share)
    ahead, ahead_unit = cell, first_unit  # whose x is fetched next
    for i in gl.static_range(STAGES):
        _fetch(xs, ready, x_desc, i, offset + ahead[1], ahead_unit < last, i % PIECES, CHUNKS)
        if i % PIECES == PIECES - 1:
            ahead, ahead_unit = _next(ahead, share), ahead_unit + 1
    acc = gl.zeros([ROWS, M], gl.float32, MMA)
    for unit in range(first_unit, last):
        tile, block = cell
        group = (unit - first_unit) % 2
        begins = (unit == first_unit) | (block == 0)
        ends = (unit == last - 1) | (block == width - 1)
        held = ends & (gl.program_id(0) >= helpers)  # an owner transposes y where the tile is
        for i in gl.static_range(PIECES):
            piece = (unit - first_unit) * PIECES + i
            stage = piece % STAGES
            mbarrier.wait(ready.index(stage), piece // STAGES % 2)
            if i == 0:  # x is there first: what stands between `full` and `empty` keeps a group waiting
                mbarrier.wait(full.index(group), (unit - first_unit) // 2 % 2)
            for c in gl.static_range(CHUNKS):
                acc = warpgroup_mma(
                    w.index(group).slice(64 * (i * CHUNKS + c), 64, 0).permute((1, 0)), xs.index(stage * CHUNKS + c).permute((1, 0)), acc,
                    use_acc=begins == 0 if i + c == 0 else True, is_async=True,
                )  # fmt: skip
            for half in gl.static_range(CHUNKS // 2):
                acc = warpgroup_mma_wait(CHUNKS - 2 - 2 * half, deps=[acc])
                barrier()  # all warps are done with it
                if not held:
                    mbarrier.arrive(empty.index(group * 2 + i * (CHUNKS // 2) + half))
            if i == PIECES - 1:
                if SUM == "later" and ends:
                    parts.put(acc, tile, parts_ptr)
                if SUM == "here" and ends and not held:
                    parts.lend(acc, tile, parts_ptr, arrived_ptr)
                if SUM != "later" and held:
                    if SUM == "here":
                        acc = parts.collect(acc, tile, lent, load, parts_ptr, arrived_ptr)
                    finish(acc, w.index(group), tile, bias_ptr, y_ptr, N, x_rows, BIAS)
                    barrier()
                    for half in gl.static_range(2):
                        mbarrier.arrive(empty.index(group * 2 + half))
            _fetch(
                xs, ready, x_desc, piece + STAGES, offset + ahead[1], ahead_unit < last, (i + STAGES) % PIECES, CHUNKS
            )
            if (i + STAGES) % PIECES == PIECES - 1:
                ahead, ahead_unit = _next(ahead, share), ahead_unit + 1
        cell = _next(cell, share)


@gluon.jit(do_not_specialize=["helpers", "owned", "lent", "load"])
def _batch_kernel(
    x_desc, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr,
    N, x_rows, atoms, tiles, B, helpers, owned, lent, load,
    M: gl.constexpr, CHUNKS: gl.constexpr, REGISTERS: gl.constexpr, DEPTH: gl.constexpr, DTYPE: gl.constexpr, BIAS: gl.constexpr,
    SUM: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    w = gl.allocate_shared_memory(DTYPE, [2, COLUMNS, ROWS], SHARED)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES * CHUNKS, M, 64], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(4):
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    share = _share(tiles, B, helpers, owned, lent, load)
    gl.warp_specialize(
        [
            (_multiply, (w, xs, ready, full, empty, x_desc, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, share, helpers, lent, load, CHUNKS, BIAS, SUM, EARLY)),
            (_scatter, (full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, share, atoms, B, 0, DEPTH)),
            (_scatter, (full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, share, atoms, B, 1, DEPTH)),
        ],
        [8, 8], [REGISTERS, REGISTERS],
    )  # fmt: skip


class Shares(NamedTuple):
    """Which units a program takes, and how the sums of a tile come together: see parts.py."""

    sum: str  # "whole" if owners have all blocks; "here" if they collect what helpers have; "later" if all help and a kernel adds
    owners: int
    helpers: int
    owned: int  # tiles to an owner
    lent: int  # blocks of every tile that helpers take
    load: int  # units to a helper


@functools.cache
def shares(tiles: int, B: int, M: int, sms: int) -> Shares:
    """The shares by which the program with the most units has the fewest, where others than whole tiles are worth what adding costs."""
    owned = triton.cdiv(tiles, sms)
    owners = triton.cdiv(tiles, owned)
    ways = [(owned * B, Shares("whole", owners, 0, owned, 0, 1))]
    even = triton.cdiv(tiles * B, sms)
    if M == MOST or LATER * even < B:
        ways.append((even + JOIN[M], Shares("later", 0, triton.cdiv(tiles * B, even), 1, B, even)))
    elif owners < sms:
        for lent in range(1, B):
            load = triton.cdiv(tiles * lent, sms - owners)
            here = Shares("here", owners, triton.cdiv(tiles * lent, load), owned, lent, load)
            ways.append((max(owned * (B - lent), load) + JOIN[M], here))
    return min(ways, key=operator.itemgetter(0))[1]  # the first of several


def multiply(
    x: torch.Tensor, values: torch.Tensor, gaps: torch.Tensor, extras: torch.Tensor, places: torch.Tensor, starts: torch.Tensor,
    extra_starts: torch.Tensor, arrived: torch.Tensor, bias: torch.Tensor | None, N: int, K: int,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] and the fields of a Tile, values of x's 16-bit dtype -> [M, N]."""
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    x = aligned(x, 64)  # a chunk: what TMA copies must not be wider than what there is
    weight = values.view(torch.int32), gaps, extras.view(torch.int16), places, starts, extra_starts
    B, tiles = triton.cdiv(K, COLUMNS.value), triton.cdiv(N, ROWS.value)
    steps = gaps.shape[0] / 128 / (starts.shape[0] - 1)  # of a block, on average
    depth = DEPTHS[0] if steps <= LONG else DEPTHS[1]
    early = early_start(x.device)
    for i in range(0, x.shape[0], MOST):
        part = x[i : i + MOST]
        M = max(FEWEST, triton.next_power_of_2(part.shape[0]))
        x_desc = TensorDescriptor.from_tensor(part, [M, 64], SHARED.value)
        share = shares(tiles, B, M, multiprocessors(x.device))
        sums = y if share.sum == "whole" else parts.allocate(tiles, share.helpers, ROWS.value, M, x.device)
        _batch_kernel[(share.helpers + share.owners,)](
            x_desc, *weight, y if bias is None else bias, y[i:], sums, arrived,
            N, part.shape[0], triton.cdiv(N, 64), tiles, B, share.helpers, share.owned, share.lent, share.load,
            M=M, CHUNKS=CHUNKS[M], REGISTERS=REGISTERS[M], DEPTH=depth, DTYPE=DTYPES[x.dtype], BIAS=bias is not None, SUM=share.sum,
            **early, num_warps=4,
        )  # fmt: skip
        if share.sum == "later":
            parts.add(sums, y[i : i + MOST], bias, ROWS.value, M, share.lent, share.load)
    return y
