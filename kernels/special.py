"""The product of batch.py for 33 to 128 rows of x, the work split between warps: some scatter while others multiply.

A program has a multiprocessor to itself. Two groups of 8 warps each own a tile of 128 rows and 256 columns in shared memory and scatter
half of the blocks into it; 4 warps copy x in chunks of 64 columns, multiply and store y. `full` says that a tile holds its block,
`empty` that it has been multiplied.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dlpkit.kernels.product import fetch, finish, join
from dlpkit.kernels.scatter import COLUMNS, barrier, clear, put_extras, read_extras, start, walk, walker

ROWS = gl.constexpr(128)  # of a tile
ROUNDS = gl.constexpr(1)  # of extras that are read ahead, one to a thread
STAGES = {64: 4, 128: 3}  # rows of x -> chunks of x in shared memory
REGISTERS = 72  # of a thread that scatters; those that multiply have the rest, of which joining parts takes all
JOIN = 3  # units that adding the parts of a tile takes as long as: H100, 14336 x 4096


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
def _edges(starts_ptr, extra_starts_ptr, upper, lower):
    """Steps before a block, as many in the upper 64 rows as in the lower; extras before it in the upper ones, in the lower ones."""
    return gl.load(starts_ptr + upper), gl.load(extra_starts_ptr + upper), gl.load(extra_starts_ptr + lower)


@gluon.jit
def _extras(extras_ptr, places_ptr, before, after, above, lane):
    """Of a block, what `put_extras` wants."""
    extra = gl.where(above, before[1], before[2])
    more = gl.where(above, after[1] - before[1], after[2] - before[2])
    ahead, mine = read_extras(extras_ptr, places_ptr, extra, more, lane, ROUNDS)
    return extra, gl.maximum(after[1] - before[1], after[2] - before[2]), ahead, mine


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
        run = starts_ptr + gl.where(above, upper, lower)
        stream, ring = start(values_ptr, gaps_ptr, gl.load(run), lane)
        before = _edges(starts_ptr, extra_starts_ptr, upper, lower)
        after = _edges(starts_ptr, extra_starts_ptr, upper + gl.minimum(1, count), lower + gl.minimum(1, count))
        waiting = _extras(extras_ptr, places_ptr, before, after, above, lane)
        for i in range(0, count):
            behind = gl.minimum(i + 2, count)
            later = _edges(starts_ptr, extra_starts_ptr, upper + behind, lower + behind)
            mbarrier.wait(empty, phase)
            clear(me, 8)
            barrier()
            put_extras(extras_ptr, places_ptr, waiting, lane, me, ROUNDS)
            stream, ring = walk(stream, ring, after[0] - before[0], me)
            before, after = after, later
            waiting = _extras(extras_ptr, places_ptr, before, after, above, lane)
            fence_async_shared()
            barrier()
            mbarrier.arrive(full)
            phase ^= 1


@gluon.jit
def _multiply(
    w, xs, room, full, empty, x_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, octets, x_rows, stride_x, first_unit, last, B, U,
    M: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = xs.shape[0]
    AHEAD: gl.constexpr = STAGES - 1
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    m = gl.arange(0, M, gl.SliceLayout(1, COPY))
    k = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    tile, b, group, begins, ends = _turn(first_unit, first_unit, last, B)
    for i in gl.static_range(AHEAD):
        fetch(xs.index(i), x_ptr, m, k, b * COLUMNS + 64 * i, x_rows, octets, stride_x)
    acc = gl.zeros([ROWS, M], gl.float32, MMA)
    j = 0
    turns = 0, 0  # that each group has had
    for unit in range(first_unit, last):
        after = _turn(unit + 1, first_unit, last, B)
        mbarrier.wait(full.index(group), gl.where(group == 0, turns[0], turns[1]) % 2)
        for i in gl.static_range(4):
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            barrier()
            acc = warpgroup_mma(
                w.index(group).slice(64 * i, 64, 0).permute((1, 0)), xs.index(j % STAGES).permute((1, 0)), acc,
                use_acc=(begins == 0) if i == 0 else True, is_async=True,
            )  # fmt: skip
            acc = warpgroup_mma_wait(1, deps=[acc])
            barrier()  # all warps are done with the chunk before
            to = xs.index((j + AHEAD) % STAGES)
            if i + AHEAD < 4:
                fetch(to, x_ptr, m, k, b * COLUMNS + 64 * (i + AHEAD), x_rows, octets, stride_x)
            else:
                live = gl.where(unit + 1 < last, x_rows, 0)
                fetch(to, x_ptr, m, k, after[1] * COLUMNS + 64 * (i + AHEAD - 4), live, octets, stride_x)
            j += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(empty.index(group))
        if ends:
            if SPLIT:
                join(acc, room, tile, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, B, U, BIAS)
            else:
                finish(acc, room, tile, bias_ptr, y_ptr, N, x_rows, BIAS)
        turns = turns[0] + 1 - group, turns[1] + group
        tile, b, group, begins, ends = after


@gluon.jit
def special_kernel(
    x_ptr, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr,
    N, octets, x_rows, stride_x, atoms, B, units, U,
    M: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    w = gl.allocate_shared_memory(DTYPE, [2, COLUMNS, ROWS], SHARED)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, M, 64], SHARED)
    room = gl.allocate_shared_memory(DTYPE, [M, ROWS], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    first_unit = gl.program_id(0) * U
    last = gl.minimum(first_unit + U, units)
    gl.warp_specialize(
        [
            (_multiply, (w, xs, room, full, empty, x_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, octets, x_rows, stride_x, first_unit, last, B, U, M, BIAS, SPLIT)),
            (_scatter, (full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, last, atoms, B, 0)),
            (_scatter, (full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, last, atoms, B, 1)),
        ],
        [8, 8], [REGISTERS, REGISTERS],
    )  # fmt: skip


def units(tiles: int, B: int, sms: int) -> int:
    """U: whole tiles to a program, unless sharing them evenly takes less even with their parts to add."""
    whole, shared = B * triton.cdiv(tiles, sms), triton.cdiv(tiles * B, sms)
    return whole if whole <= shared + JOIN else shared
