"""The x and y side of the products of a tile weight: chunks of x to shared memory, parts of a tile added, y stored."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from dlpkit.kernels.scatter import barrier, opaque


@gluon.jit
def fetch(to, x_ptr, m, k, column, x_rows, octets, stride_x):
    """Copy x[:, column : column + 64] to shared memory, zeros where x has none; `octets` of columns, `stride_x` in octets."""
    x = x_ptr + column + opaque(m).to(gl.int64)[:, None] * (stride_x * 8) + k[None, :]
    async_copy.async_copy_global_to_shared(to, x, mask=(m[:, None] < x_rows) & (k[None, :] < octets * 8 - column))
    async_copy.commit_group()


@gluon.jit
def join(acc, room, tile, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, B, U, BIAS: gl.constexpr):
    """Add the parts of all programs that share a tile, in the last one to arrive. Program i has part i + t of tile t.

    `arrived` counts the programs that have stored their part, and is zero again at the end.
    """
    ROWS: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    begin = tile * B // U
    count = (tile * B + B - 1) // U - begin + 1
    r = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + opaque(0)
    m = gl.arange(0, M, gl.SliceLayout(0, LAYOUT))
    part = parts_ptr + (begin + tile).to(gl.int64) * (ROWS * M) + r[:, None] * M + m[None, :]
    last = count == 1
    if count > 1:
        gl.store(part + (gl.program_id(0) - begin).to(gl.int64) * (ROWS * M), acc)
        barrier()
        last = gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == count - 1
        if last:
            gl.store(arrived_ptr + tile, 0)
            acc = gl.zeros([ROWS, M], gl.float32, LAYOUT)
            for i in range(count):
                acc += gl.load(part + i.to(gl.int64) * (ROWS * M), cache_modifier=".cg")
    if last:
        finish(acc, room, tile, bias_ptr, y_ptr, N, x_rows, BIAS)


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
