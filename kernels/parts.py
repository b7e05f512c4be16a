"""y = the sum of what several programs have of a tile, plus bias.

Where a layer has fewer tiles than the GPU has multiprocessors, `batch` and `mma` share a tile's columns among programs, U units to each of
B to a tile. Each stores its sums in float32: program i has part i + t of tile t, [M / 8, ROWS, 8]. They are added in order, the same y every time,

- by the last program to arrive, while others still work (`join`), or
- by a kernel of its own (`add`), where the parts are so large that one multiprocessor would read them longer than a launch takes.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dlpkit.kernels.early import early_start, inputs_ready, let_next_start
from dlpkit.kernels.product import finish
from dlpkit.kernels.scatter import barrier, opaque

PARTS = tl.constexpr(8)  # that a thread of `add` asks for before it adds them
N_ROWS = tl.constexpr(64)  # of the weight, for a program of `add`, with eight of x


def allocate(tiles: int, programs: int, rows: int, M: int, device: torch.device) -> torch.Tensor:
    """For the parts of tiles of [rows, M]."""
    return torch.empty((programs + tiles) * rows * M, dtype=torch.float32, device=device)


@gluon.jit
def _of(part, tile):
    """Where the elements of a tile [ROWS, M] stand in a part. Pointers from the start: sums of offsets would be kept in registers through the
    loop over units.
    """
    ROWS: gl.constexpr = tile.shape[0]
    LAYOUT: gl.constexpr = tile.type.layout
    r = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    m = gl.arange(0, tile.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    e = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return part + m * (ROWS * 8) + r * 8 + e


@gluon.jit
def put(acc, tile, parts_ptr):
    """Store what this program has of a tile."""
    ROWS: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    part = parts_ptr + opaque(gl.program_id(0) + tile).to(gl.int64) * (ROWS * M)
    acc = acc.reshape([ROWS, M // 8, 8])
    gl.store(_of(part, acc), acc)


@gluon.jit
def join(acc, room, tile, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, B, U, BIAS: gl.constexpr):
    """Store a part, and if all others of the tile are there, y. `arrived` counts them, and is zero again at the end."""
    ROWS: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    put(acc, tile, parts_ptr)
    barrier()
    begin = tile * B // U
    count = (tile * B + B - 1) // U - begin + 1
    if gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == count - 1:
        gl.store(arrived_ptr + tile, 0)
        part = parts_ptr + opaque(begin + tile).to(gl.int64) * (ROWS * M)
        total = gl.zeros_like(acc).reshape([ROWS, M // 8, 8])
        for i in range(count):
            total += gl.load(_of(part + i * (ROWS * M), total), cache_modifier=".cg")
        total = gl.convert_layout(total.reshape([ROWS, M]), acc.type.layout, assert_trivial=True)
        finish(total, room, tile, bias_ptr, y_ptr, N, x_rows, BIAS)


@triton.jit
def _add_kernel(
    parts_ptr, bias_ptr, y_ptr, N, x_rows, B, U,
    ROWS: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    n = tl.program_id(0) * N_ROWS + tl.arange(0, N_ROWS)
    octet, e = tl.program_id(1), tl.arange(0, 8)
    m = octet * 8 + e
    tile = tl.program_id(0) * N_ROWS // ROWS
    begin = tile * B // U
    count = (tile * B + B - 1) // U - begin + 1
    part = parts_ptr + (begin + tile).to(tl.int64) * (ROWS * M) + octet * (ROWS * 8)
    part += (n % ROWS * 8)[:, None] + e[None, :]
    total = tl.zeros([N_ROWS, 8], tl.float32)
    inputs_ready(EARLY)
    for i in range(0, count, PARTS):
        for j in tl.static_range(PARTS):
            total += tl.load(part + (i + j) * (ROWS * M), mask=i + j < count, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y, total, mask=(m[None, :] < x_rows) & (n[:, None] < N))


def add(parts: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, rows: int, M: int, B: int, U: int) -> None:
    """Parts of [rows, M], of tiles of B units where a program takes U -> y [up to M, N]."""
    x_rows, N = y.shape
    _add_kernel[triton.cdiv(N, N_ROWS.value), triton.cdiv(x_rows, 8)](
        parts, y if bias is None else bias, y, N, x_rows, B, U,
        ROWS=rows, M=M, BIAS=bias is not None, **early_start(y.device), num_warps=4,
    )  # fmt: skip
