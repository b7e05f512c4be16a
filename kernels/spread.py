"""A tile weight to the dense [K, N] on the GPU, at the speed of memory: what more rows of x than `batch` takes multiply by.

Tiles as in batch.py; instead of a product, every tile is copied out, a line of 64 rows to a column.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dlpkit.kernels.batch import DTYPES, ROUNDS
from dlpkit.kernels.scatter import COLUMNS, barrier, clear, find, opaque, put_extras, read_extras, start, walk, walker

ROWS = gl.constexpr(64)  # of a tile
UNITS, REGISTERS = 2, 96  # of a program, of a thread: H100, 14336 x 4096


@gluon.jit
def _spread_kernel(
    values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, out_ptr,  # out [K, N]
    N, K, atoms, B, units, U,
    DTYPE: gl.constexpr,
):  # fmt: skip
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    w = gl.allocate_shared_memory(DTYPE, [COLUMNS, ROWS], gl.NVMMASharedLayout(128, 16, rank=2))
    lane, half, me = walker(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])), 0)
    k = gl.arange(0, 64, gl.SliceLayout(1, OUT))
    n = gl.arange(0, ROWS, gl.SliceLayout(0, OUT))

    first_unit = gl.program_id(0) * U
    last = gl.minimum(first_unit + U, units)
    tile = first_unit // B
    b = first_unit - tile * B
    steps, most, first, left, extra, more = find(starts_ptr, extra_starts_ptr, tile, b, atoms, B, last, half)
    stream, ring = start(values_ptr, gaps_ptr, first, left, lane)
    ahead, mine = read_extras(extras_ptr, places_ptr, extra, more, lane, ROUNDS)
    for unit in range(first_unit, last):
        clear(me, 4)
        barrier()
        put_extras(extras_ptr, places_ptr, extra, most, lane, ahead, mine, me, ROUNDS)
        stream, ring = walk(stream, ring, steps, me)
        barrier()
        for i in gl.static_range(4):
            column = b * COLUMNS + 64 * i + opaque(k)[:, None]
            row = tile * ROWS + n[None, :]
            out = out_ptr + column.to(gl.int64) * N + row
            gl.store(out, w.slice(64 * i, 64, 0).load(OUT), mask=(column < K) & (row < N))
        b += 1
        tile = gl.where(b == B, tile + 1, tile)
        b = gl.where(b == B, 0, b)
        steps, most, first, left, extra, more = find(starts_ptr, extra_starts_ptr, tile, b, atoms, B, last, half)
        ahead, mine = read_extras(extras_ptr, places_ptr, extra, gl.where(unit < last - 1, more, 0), lane, ROUNDS)
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
        N, K, triton.cdiv(N, 64), B, units, UNITS,
        DTYPE=DTYPES[values.dtype], num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out
