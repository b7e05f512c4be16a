"""A tile weight to the dense [K, N] on the GPU, at the speed of memory: what more rows of x than `batch` takes multiply by.

Tiles as in batch.py; instead of a product, every tile is copied out, a line of 64 rows to a column.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dlpkit.kernels.batch import DTYPES, ROUNDS
from dlpkit.kernels.scatter import COLUMNS, barrier, begin, clear, opaque, proceed, put_extras, walk, walker

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
    tile, b, steps, stream, ring, extras = begin(
        values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, atoms, B, half, lane, ROUNDS
    )  # fmt: skip
    for unit in range(first_unit, last):
        clear(me, 4)
        barrier()
        put_extras(extras_ptr, places_ptr, extras, lane, me, ROUNDS)
        stream, ring = walk(stream, ring, steps, me)
        barrier()
        for i in gl.static_range(4):
            column = b * COLUMNS + 64 * i + opaque(k)[:, None]
            row = tile * ROWS + n[None, :]
            out = out_ptr + column.to(gl.int64) * N + row
            gl.store(out, w.slice(64 * i, 64, 0).load(OUT), mask=(column < K) & (row < N))
        tile, b, steps, extras = proceed(
            extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, tile, b, unit < last - 1, atoms, B, half, lane, ROUNDS
        )  # fmt: skip
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
