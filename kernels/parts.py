"""y = the sum of what several programs have of a tile, plus bias.

Where a layer has not as many tiles as the GPU has multiprocessors, `batch` and `mma` share the blocks of a tile. Of the blocks that helpers
have of each tile, `lent`, each helper takes `load` units, on through all tiles, and stores its sums in float32: helper i has part i + t of
tile t, [M / 8, ROWS, 8]. They are added in order, the same y every time,

- by the owner of the tile, who has its other blocks and waits for theirs (`collect`), or
- where nobody owns a tile, by a kernel of its own (`add`): where the parts are so large or so many that one multiprocessor would read
  them longer than a launch takes.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dlpkit.kernels.early import early_start, inputs_ready, let_next_start
from dlpkit.kernels.scatter import barrier, opaque

PARTS = tl.constexpr(8)  # that a thread of `add` asks for before it adds them
N_ROWS = tl.constexpr(64)  # of the weight, for a program of `add`, with eight of x
WAIT = gl.constexpr("""{ .reg .pred p; .reg .b32 there;
    again: ld.acquire.gpu.global.b32 there, [$1]; setp.lt.s32 p, there, $2; @p bra again; mov.b32 $0, 0; }""")


def allocate(tiles: int, helpers: int, rows: int, M: int, device: torch.device) -> torch.Tensor:
    """For the parts of tiles of [rows, M]."""
    return torch.empty((helpers + tiles) * rows * M, dtype=torch.float32, device=device)


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
    """Store what this helper has of a tile."""
    ROWS: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    part = parts_ptr + opaque(gl.program_id(0) + tile).to(gl.int64) * (ROWS * M)
    acc = acc.reshape([ROWS, M // 8, 8])
    gl.store(_of(part, acc), acc)


@gluon.jit
def lend(acc, tile, parts_ptr, arrived_ptr):
    """Store what this helper has of a tile, and count it for the owner."""
    put(acc, tile, parts_ptr)
    barrier()
    gl.atomic_add(arrived_ptr + tile, 1, sem="release", scope="gpu")


@gluon.jit
def collect(acc, tile, lent, load, parts_ptr, arrived_ptr):
    """An owner's sums and those of its helpers, once all are there. `arrived` is zero again at the end."""
    ROWS: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    AT_ONCE: gl.constexpr = 64 // M  # parts, as registers allow
    begin = tile * lent // load
    count = (tile * lent + lent - 1) // load - begin + 1
    gl.inline_asm_elementwise(WAIT, "=r,l,r", [arrived_ptr + tile, count], dtype=gl.int32, is_pure=False, pack=1)
    part = parts_ptr + opaque(begin + tile).to(gl.int64) * (ROWS * M)
    total = acc.reshape([ROWS, M // 8, 8])
    for i in range(0, count, AT_ONCE):
        for j in gl.static_range(AT_ONCE):
            total += gl.load(
                _of(part + (i + j) * (ROWS * M), total), mask=i + j < count, other=0.0, cache_modifier=".cg"
            )
    barrier()
    gl.store(arrived_ptr + tile, 0)
    return gl.convert_layout(total.reshape([ROWS, M]), acc.type.layout, assert_trivial=True)


@triton.jit
def _add_kernel(
    parts_ptr, bias_ptr, y_ptr, N, x_rows, lent, load,
    ROWS: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    n = tl.program_id(0) * N_ROWS + tl.arange(0, N_ROWS)
    octet, e = tl.program_id(1), tl.arange(0, 8)
    m = octet * 8 + e
    tile = tl.program_id(0) * N_ROWS // ROWS
    begin = tile * lent // load
    count = (tile * lent + lent - 1) // load - begin + 1
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


def add(
    parts: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, rows: int, M: int, lent: int, load: int
) -> None:
    """Parts of [rows, M] -> y [up to M, N]."""
    x_rows, N = y.shape
    _add_kernel[triton.cdiv(N, N_ROWS.value), triton.cdiv(x_rows, 8)](
        parts, y if bias is None else bias, y, N, x_rows, lent, load,
        ROWS=rows, M=M, BIAS=bias is not None, **early_start(y.device), num_warps=4,
    )  # fmt: skip
