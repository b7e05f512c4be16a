"""The product of batch.py for 33 to 128 rows of x, the work split between warps: some scatter while others multiply.

A program has a multiprocessor to itself. Two groups of 8 warps each own a tile of 128 rows and 256 columns in shared memory and scatter
every second unit into it; 4 warps copy x in chunks of 64 columns, multiply and store y. `full` says that a tile holds its unit,
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
from dlpkit.kernels.scatter import COLUMNS, barrier, clear, find, put_extras, read_extras, start, walk, walker

ROWS = gl.constexpr(128)  # of a tile
STAGES = {64: 4, 128: 3}  # rows of x -> chunks of x in shared memory
REGISTERS = {64: 88, 128: 72}  # of a thread that scatters; those that multiply have the rest
JOIN = 3  # units that adding the parts of a tile takes as long as: H100, 14336 x 4096


@gluon.jit
def _scatter(
    full, empty, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, last, atoms, B,
    GROUP: gl.constexpr,
):  # fmt: skip
    lane, half, me = walker(gl.arange(0, 256, gl.BlockedLayout([1], [32], [8], [0])), GROUP)
    full, empty, unit = full.index(GROUP), empty.index(GROUP), first_unit + GROUP
    steps, most, first, left, extra, more = find(
        starts_ptr, extra_starts_ptr, unit // B, unit % B, atoms, B, unit + 1, half, ROWS
    )
    live = unit < last
    stream, ring = start(values_ptr, gaps_ptr, first, gl.where(live, left, 0), lane)
    ahead, mine = read_extras(extras_ptr, places_ptr, extra, gl.where(live, more, 0), lane)
    phase = 1
    for unit in range(first_unit + GROUP, last, 2):
        mbarrier.wait(empty, phase)
        clear(me, 8)
        barrier()
        put_extras(extras_ptr, places_ptr, extra, most, lane, ahead, mine, me)
        stream, ring = walk(stream, ring, steps, me)
        live = unit + 2 < last
        after = gl.where(live, unit + 2, unit)
        steps, most, first, left, extra, more = find(
            starts_ptr, extra_starts_ptr, after // B, after % B, atoms, B, after + 1, half, ROWS
        )
        stream, ring = start(values_ptr, gaps_ptr, first, gl.where(live, left, 0), lane)
        ahead, mine = read_extras(extras_ptr, places_ptr, extra, gl.where(live, more, 0), lane)
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
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    m = gl.arange(0, M, gl.SliceLayout(1, COPY))
    k = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    chunks = (last - first_unit) * 4
    begin = first_unit % B * 4
    for i in gl.static_range(STAGES - 1):
        fetch(xs.index(i), x_ptr, m, k, (begin + i) % (4 * B) * 64, x_rows, octets, stride_x)
    acc = gl.zeros([ROWS, M], gl.float32, MMA)
    j = 0
    for unit in range(first_unit, last):
        turn = unit - first_unit
        b = unit % B
        mbarrier.wait(full.index(turn % 2), turn // 2 % 2)
        for i in gl.static_range(4):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            barrier()
            acc = warpgroup_mma(
                w.index(turn % 2).slice(64 * i, 64, 0).permute((1, 0)), xs.index(j % STAGES).permute((1, 0)), acc,
                use_acc=((unit != first_unit) & (b != 0)) if i == 0 else True, is_async=True,
            )  # fmt: skip
            acc = warpgroup_mma_wait(1, deps=[acc])
            barrier()  # all warps are done with the chunk before
            ahead = j + STAGES - 1
            live = gl.where(ahead < chunks, x_rows, 0)
            fetch(xs.index(ahead % STAGES), x_ptr, m, k, (begin + ahead) % (4 * B) * 64, live, octets, stride_x)
            j += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(empty.index(turn % 2))
        if (unit == last - 1) | (b == B - 1):
            if SPLIT:
                join(acc, room, unit // B, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, B, U, BIAS)
            else:
                finish(acc, room, unit // B, bias_ptr, y_ptr, N, x_rows, BIAS)


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
