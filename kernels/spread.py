"""A tile weight to the dense [K, N] on the GPU, at the speed of memory: what more rows of x than `batch` takes multiply by.

A unit is a block. Every tile is copied out, a line of 64 rows to a column.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dlpkit.kernels.product import DTYPES
from dlpkit.kernels.scatter import (
    COLUMNS,
    barrier,
    clear,
    load_table,
    of_lane,
    opaque,
    put_first,
    put_rest,
    read_extras,
    start,
    walk,
    walker,
)

ROWS = gl.constexpr(64)  # of a tile
UNITS, REGISTERS = 2, 96  # of a program, at most 31; of a thread: H100, 14336 x 4096
DEPTH = gl.constexpr(8)  # steps that a ring holds


@gluon.jit
def _spread_kernel(
    values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, out_ptr,  # out [K, N]
    N, K, B, units, U,
    DTYPE: gl.constexpr,
):  # fmt: skip
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    w = gl.allocate_shared_memory(DTYPE, [COLUMNS, ROWS], gl.NVMMASharedLayout(128, 16, rank=2))
    lane, _, me = walker(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])), 0)
    k = gl.arange(0, 64, gl.SliceLayout(1, OUT))
    n = gl.arange(0, ROWS, gl.SliceLayout(0, OUT))

    first = gl.program_id(0) * U
    count = gl.minimum(U, units - first)
    starts, extra_starts = load_table(starts_ptr + first, count), load_table(extra_starts_ptr + first, count)
    begin, end = of_lane(starts, 0), of_lane(starts, 1)
    weight = values_ptr, gaps_ptr
    ring = start(weight, begin * 128 + lane, end - begin, DEPTH)
    extra = of_lane(extra_starts, 0)
    more = of_lane(extra_starts, 1) - extra
    extras = read_extras(extras_ptr, places_ptr, extra, more, lane)
    for i in range(0, count):
        for part in gl.static_range(2):
            clear(me, part, 4)
        barrier()
        put_first(extras, more, me)
        steps = end - begin
        at = begin * 128 + lane
        begin, end = end, of_lane(starts, gl.minimum(i + 2, count))
        ring = walk(weight, at, ring, steps, begin * 128 + lane, end - begin, me)
        put_rest(extras_ptr, places_ptr, extra, more, more, lane, me)
        barrier()
        tile = (first + i) // B
        b = first + i - tile * B
        for j in gl.static_range(4):
            column = b * COLUMNS + 64 * j + opaque(k)[:, None]
            row = tile * ROWS + n[None, :]
            out = out_ptr + column.to(gl.int64) * N + row
            gl.store(out, w.slice(64 * j, 64, 0).load(OUT), mask=(column < K) & (row < N))
        extra += more
        more = of_lane(extra_starts, gl.minimum(i + 2, count)) - extra
        extras = read_extras(extras_ptr, places_ptr, extra, more, lane)
        barrier()


def spread(
    values: torch.Tensor, gaps: torch.Tensor, extras: torch.Tensor, places: torch.Tensor, starts: torch.Tensor,
    extra_starts: torch.Tensor, N: int, K: int,
) -> torch.Tensor:  # fmt: skip
    """The fields of a Tile, 16-bit values -> [K, N]."""
    out = torch.empty(K, N, dtype=values.dtype, device=values.device)
    B = triton.cdiv(K, 256)
    units = triton.cdiv(N, 64) * B
    _spread_kernel[(triton.cdiv(units, UNITS),)](
        values.view(torch.int32), gaps, extras.view(torch.int16), places, starts, extra_starts, out,
        N, K, B, units, UNITS,
        DTYPE=DTYPES[values.dtype], num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out
