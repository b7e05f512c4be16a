"""What the products on Hopper's tensor cores have in common: x with aligned rows, y stored."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dlpkit.kernels.scatter import barrier, opaque

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROUNDED = gl.constexpr(32)  # rows of y that are rounded at a time


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
def _transpose(acc, out, FIRST: gl.constexpr):
    """Store a tile [ROWS, M] as [M, ROWS] from row FIRST on, a few rows at a time: sums and what they are rounded to need registers both,
    and only barriers keep ptxas from rounding all first.
    """
    M: gl.constexpr = acc.shape[1]
    if M > ROUNDED:
        HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], acc.type.layout.warps_per_cta, [16, M // 2, 16])
        first, second = acc.reshape([acc.shape[0], 2, M // 2]).permute((0, 2, 1)).split()
        _transpose(gl.convert_layout(first, HALF, assert_trivial=True), out, FIRST)
        barrier()
        _transpose(gl.convert_layout(second, HALF, assert_trivial=True), out, FIRST + M // 2)
    else:
        out.slice(FIRST, M).permute((1, 0)).store(acc.to(out.dtype))


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
    _transpose(acc, out, 0)
    barrier()
    ROWS_AT_ONCE: gl.constexpr = gl.num_warps() * 256 // ROWS
    # one at a time and opaque: rows and addresses of all are kept in registers otherwise, and ptxas spills those of other warps
    m = opaque(gl.arange(0, ROWS_AT_ONCE, gl.SliceLayout(1, OUT)))
    n = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    for first in gl.static_range(0, M, ROWS_AT_ONCE):
        y = y_ptr + m[:, None].to(gl.int64) * N + n[None, :]
        gl.store(y, out.slice(first, ROWS_AT_ONCE).load(OUT), mask=(m[:, None] < x_rows) & (n[None, :] < N))
        m = opaque(m + ROWS_AT_ONCE)
    barrier()
