"""y = x W^T + bias for a tile weight and up to 128 rows of x: some warps scatter nonzeros into shared memory while others multiply.

A unit is a tile of 128 rows by 256 columns. A program has a multiprocessor to itself and takes U units one after the other, all blocks of
a tile before the next tile. Two groups of 8 warps each own a tile in shared memory, clear it and scatter half of the blocks into it;
4 warps multiply, wgmma with both operands in shared memory, and store y; x comes by TMA, a piece of a block's columns at a time.
`ready` says that a piece is there, `full` that a tile holds its block, `empty` that it has been multiplied. A tile whose blocks several
programs share is summed as parts.py says.
"""

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
    load_table,
    of_lane,
    put_rest,
    read_extras,
    reset,
    start,
    walk,
    walker,
)

FEWEST, MOST = 16, 128  # rows of x in a launch
ROWS = gl.constexpr(128)  # of a tile
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
STAGES = gl.constexpr(3)  # pieces of x in shared memory
REGISTERS = gl.constexpr(72)  # of a thread that scatters; those that multiply have the rest
CHUNKS = {16: 4, 32: 4, 64: 4, 128: 2}  # rows of x -> chunks of 64 columns in a piece
JOIN = {16: 1, 32: 1, 64: 2, 128: 6}  # -> units that adding the parts of a tile takes as long as: H100, 14336 x 4096
LATER = 4  # programs to a tile past which a kernel of its own adds their parts, as it always does for 128 rows: H100, 4096 and 1024 x 4096


@gluon.jit
def _turn(unit, first_unit, last, B):
    """A unit's tile and block, the group that scatters it, and whether it is the first and the last of its tile that the program has.

    The first half of a tile's blocks is group 0's and the rest group 1's, so that a group reads on and on; they take turns.
    """
    tile = unit // B
    begin = gl.maximum(first_unit, tile * B)
    count = gl.minimum(last, tile * B + B) - begin
    i = unit - begin
    group = i % 2
    return tile, begin - tile * B + i // 2 + group * ((count + 1) // 2), group, i == 0, i == count - 1


@gluon.jit
def _tables(starts_ptr, extra_starts_ptr, upper, lower, last):
    """Of up to 32 blocks: steps before each, as many in the upper 64 rows as in the lower; extras before it in the upper ones, in the lower."""
    upper_extras, lower_extras = load_table(extra_starts_ptr + upper, last), load_table(extra_starts_ptr + lower, last)
    return load_table(starts_ptr + upper, last), upper_extras, lower_extras


@gluon.jit
def _edges(tables, i):
    """Those of one block."""
    return of_lane(tables[0], i), of_lane(tables[1], i), of_lane(tables[2], i)


@gluon.jit
def _extras(before, after, above):
    """Of a thread's half of a block: where its extras begin, how many there are."""
    return gl.where(above, before[1], before[2]), gl.where(above, after[1] - before[1], after[2] - before[2])


@gluon.jit
def _scatter(
    full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, last, atoms, B,
    GROUP: gl.constexpr,
):  # fmt: skip
    lane, half, me = walker(gl.arange(0, 256, gl.BlockedLayout([1], [32], [8], [0])), GROUP)
    above = half == 0
    full, empty = full.index(GROUP), empty.index(GROUP)
    phase = 1
    for tile in range(first_unit // B, (last + B - 1) // B):
        begin = gl.maximum(first_unit - tile * B, 0)
        count = gl.minimum(last - tile * B, B) - begin
        half_count = (count + 1) // 2
        begin += half_count * GROUP
        count = count - half_count if GROUP else half_count
        upper = tile * 2 * B + begin
        lower = gl.minimum(tile * 2 + 1, atoms - 1) * B + begin  # without lower rows the upper ones again: never stored
        tables = _tables(starts_ptr, extra_starts_ptr, upper, lower, count)
        below = load_table(starts_ptr + lower, 0)
        before, after = _edges(tables, 0), _edges(tables, gl.minimum(1, count))
        stream, ring = start(values_ptr, gaps_ptr, gl.where(above, before[0], of_lane(below, 0)), lane)
        extra, more = _extras(before, after, above)
        extras = read_extras(extras_ptr, places_ptr, extra, more, lane)
        for i in range(0, count):
            mbarrier.wait(empty, phase)
            most = gl.maximum(after[1] - before[1], after[2] - before[2])
            reset(extras, most, me, 8)
            stream, ring = walk(stream, ring, after[0] - before[0], me)
            extra, more = _extras(before, after, above)  # again, so that they hold no registers through the walk
            put_rest(extras_ptr, places_ptr, extra, more, most, lane, me)
            fence_async_shared()
            barrier()
            mbarrier.arrive(full)
            phase ^= 1
            behind = gl.minimum(i + 2, count)
            if (behind % 32 == 0) & (i + 2 == behind):
                tables = _tables(starts_ptr, extra_starts_ptr, upper + behind, lower + behind, count - behind)
            before, after = after, _edges(tables, behind % 32)
            extra, more = _extras(before, after, above)
            extras = read_extras(extras_ptr, places_ptr, extra, more, lane)


@gluon.jit
def _fetch(xs, ready, x_desc, piece, unit, PART: gl.constexpr, first_unit, last, B, CHUNKS: gl.constexpr):
    """Copy a piece of x, the PART-th of the unit's columns, to its stage, zeros where x has none; nothing past the last unit."""
    M: gl.constexpr = xs.shape[1]
    column = _turn(unit, first_unit, last, B)[1] * COLUMNS + PART * (64 * CHUNKS)
    live = unit < last
    stage = piece % STAGES
    mbarrier.expect(ready.index(stage), CHUNKS * M * 128, pred=live)
    for c in gl.static_range(CHUNKS):
        tma.async_copy_global_to_shared(
            x_desc, [0, column + 64 * c], ready.index(stage), xs.index(stage * CHUNKS + c), pred=live
        )


@gluon.jit
def _multiply(
    w, xs, ready, full, empty, x_desc, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, first_unit, last, B, U,
    CHUNKS: gl.constexpr, BIAS: gl.constexpr, SUM: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = xs.shape[1]
    PIECES: gl.constexpr = 4 // CHUNKS  # of a unit
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    grid("launch_dependents", EARLY)  # at once: what starts early finds only the multiprocessors that are idle
    grid("wait", EARLY)
    for i in gl.static_range(STAGES):
        _fetch(xs, ready, x_desc, i, first_unit + i // PIECES, i % PIECES, first_unit, last, B, CHUNKS)
    acc = gl.zeros([ROWS, M], gl.float32, MMA)
    turns = 0, 0  # that each group has had
    for unit in range(first_unit, last):
        tile, _, group, begins, ends = _turn(unit, first_unit, last, B)
        for i in gl.static_range(PIECES):
            piece = (unit - first_unit) * PIECES + i
            stage = piece % STAGES
            mbarrier.wait(ready.index(stage), piece // STAGES % 2)
            if i == 0:  # x is there first: what stands between `full` and `empty` keeps a group waiting
                mbarrier.wait(full.index(group), gl.where(group == 0, turns[0], turns[1]) % 2)
            for c in gl.static_range(CHUNKS):
                acc = warpgroup_mma(
                    w.index(group).slice(64 * (i * CHUNKS + c), 64, 0).permute((1, 0)), xs.index(stage * CHUNKS + c).permute((1, 0)), acc,
                    use_acc=(begins == 0) if i + c == 0 else True, is_async=True,
                )  # fmt: skip
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()  # all warps are done with the piece
            if i == PIECES - 1:
                if SUM != "later" and ends:  # the tile's memory is where y is transposed
                    if SUM == "here":
                        parts.join(acc, w.index(group), tile, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, B, U, BIAS)  # fmt: skip
                    else:
                        finish(acc, w.index(group), tile, bias_ptr, y_ptr, N, x_rows, BIAS)
                    barrier()
                mbarrier.arrive(empty.index(group))
                if SUM == "later" and ends:
                    parts.put(acc, tile, parts_ptr)
            later = i + STAGES
            _fetch(
                xs, ready, x_desc, piece + STAGES, unit + later // PIECES, later % PIECES, first_unit, last, B, CHUNKS
            )
        turns = turns[0] + 1 - group, turns[1] + group


@gluon.jit
def _batch_kernel(
    x_desc, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr,
    N, x_rows, atoms, B, units, U,
    M: gl.constexpr, CHUNKS: gl.constexpr, DTYPE: gl.constexpr, BIAS: gl.constexpr, SUM: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    w = gl.allocate_shared_memory(DTYPE, [2, COLUMNS, ROWS], SHARED)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES * CHUNKS, M, 64], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    first_unit = gl.program_id(0) * U
    last = gl.minimum(first_unit + U, units)
    gl.warp_specialize(
        [
            (_multiply, (w, xs, ready, full, empty, x_desc, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, first_unit, last, B, U, CHUNKS, BIAS, SUM, EARLY)),
            (_scatter, (full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, last, atoms, B, 0)),
            (_scatter, (full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, last, atoms, B, 1)),
        ],
        [8, 8], [REGISTERS, REGISTERS],
    )  # fmt: skip


def units(tiles: int, B: int, M: int, sms: int) -> int:
    """U: whole tiles to a program, unless sharing them evenly takes less even with their parts to add."""
    whole, shared = B * triton.cdiv(tiles, sms), triton.cdiv(tiles * B, sms)
    return whole if whole <= shared + JOIN[M] else shared


def multiply(
    x: torch.Tensor, values: torch.Tensor, gaps: torch.Tensor, extras: torch.Tensor, places: torch.Tensor, starts: torch.Tensor,
    extra_starts: torch.Tensor, arrived: torch.Tensor, bias: torch.Tensor | None, N: int, K: int,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] and the fields of a Tile, values of x's 16-bit dtype -> [M, N]."""
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    x = aligned(x, 64)  # a chunk: what TMA copies must not be wider than what there is
    weight = values.view(torch.int32), gaps, extras.view(torch.int16), places, starts, extra_starts
    B, tiles = triton.cdiv(K, COLUMNS.value), triton.cdiv(N, ROWS.value)
    early = early_start(x.device)
    for i in range(0, x.shape[0], MOST):
        part = x[i : i + MOST]
        M = max(FEWEST, triton.next_power_of_2(part.shape[0]))
        x_desc = TensorDescriptor.from_tensor(part, [M, 64], SHARED.value)
        U = units(tiles, B, M, multiprocessors(x.device))
        programs = triton.cdiv(tiles * B, U)
        # whole tiles, or parts that the last program to arrive adds here, or a kernel of its own later: see parts.py
        SUM = "whole" if U % B == 0 else "later" if M == MOST or B > LATER * U else "here"
        sums = y if SUM == "whole" else parts.allocate(tiles, programs, ROWS.value, M, x.device)
        _batch_kernel[(programs,)](
            x_desc, *weight, y if bias is None else bias, y[i:], sums, arrived,
            N, part.shape[0], triton.cdiv(N, 64), B, tiles * B, U,
            M=M, CHUNKS=CHUNKS[M], DTYPE=DTYPES[x.dtype], BIAS=bias is not None, SUM=SUM, **early, num_warps=4,
        )  # fmt: skip
        if SUM == "later":
            parts.add(sums, y[i : i + MOST], bias, ROWS.value, M, B, U)
    return y
