"""What the products on Hopper's tensor cores have in common: x with aligned rows, parts of a tile added, y stored."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dlpkit.kernels.scatter import barrier, opaque

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def aligned(x: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """x with rows that are whole 16-byte words, and at least so many columns; those past K hold zeros."""
    missing = max(-x.shape[1] % 8, columns - x.shape[1])
    if missing > 0:
        return torch.nn.functional.pad(x, (0, missing))
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@gluon.jit
def grid(WHAT: gl.constexpr, EARLY: gl.constexpr):
    """See early.py: wait for the kernel before, or let the next one start."""
    if EARLY:
        PTX: gl.constexpr = "griddepcontrol." + WHAT + "; mov.b32 $0, 0;"
        gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _offsets(tile, FIRST: gl.constexpr):
    """Where a thread's elements of [rows, columns from FIRST on] stand in a part: threads of a warp side by side."""
    ROWS: gl.constexpr = tile.shape[0]
    LAYOUT: gl.constexpr = tile.type.layout
    r = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    m = gl.arange(0, tile.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    e = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return FIRST * ROWS + m * (ROWS * 8) + r * 8 + e


@gluon.jit
def join(acc, room, tile, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, B, U, WIDTH: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    """Add the parts of all programs that share a tile, in the last one to arrive. Program i has part i + t of tile t, [M / 8, ROWS, 8].

    WIDTH: of the columns that are added at a time, by the registers there are. `arrived` counts the programs that have stored their part,
    and is zero again at the end.
    """
    ROWS: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    SLAB: gl.constexpr = M if M < WIDTH else WIDTH
    SLAB_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, SLAB, 16])
    begin = tile * B // U
    count = (tile * B + B - 1) // U - begin + 1
    # opaque: no address is kept in registers through the loop over units
    parts_ptr += opaque(begin + tile).to(gl.int64) * (ROWS * M)
    mine = acc.reshape([ROWS, M // 8, 8])
    gl.store(parts_ptr + (gl.program_id(0) - begin) * (ROWS * M) + _offsets(mine, 0), mine)
    barrier()
    if gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == count - 1:
        gl.store(arrived_ptr + tile, 0)
        for first in gl.static_range(0, M, SLAB):
            total = gl.zeros([ROWS, SLAB], gl.float32, SLAB_LAYOUT).reshape([ROWS, SLAB // 8, 8])
            for i in range(count):
                total += gl.load(parts_ptr + i * (ROWS * M) + _offsets(total, first), cache_modifier=".cg")
            slab = gl.convert_layout(total.reshape([ROWS, SLAB]), SLAB_LAYOUT, assert_trivial=True)
            finish(slab, room, tile, bias_ptr, y_ptr + first * N, N, x_rows - first, BIAS)


@gluon.jit
def finish(acc, room, tile, bias_ptr, y_ptr, N, x_rows, BIAS: gl.constexpr):
    """Add the bias and store, through shared memory, so that neighbouring threads store neighbours of a row of y."""
    ROWS: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ROWS, ROWS // 8], [gl.num_warps(), 1], [1, 0])
    if BIAS:
        r = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias_ptr + r, mask=r < N, other=0.0).to(gl.float32)[:, None]
    out = room._reinterpret(room.dtype, [M, ROWS], gl.NVMMASharedLayout(128, 16, rank=2))
    out.permute((1, 0)).store(acc.to(room.dtype))
    barrier()
    m = gl.arange(0, M, gl.SliceLayout(1, OUT))
    n = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    y = y_ptr + m[:, None].to(gl.int64) * N + n[None, :]
    gl.store(y, out.load(OUT), mask=(m[:, None] < x_rows) & (n[None, :] < N))
    barrier()
