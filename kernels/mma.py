"""y = x W^T + bias for a fragment weight and up to 128 rows of x, by Hopper's sparse tensor-core instruction.

wgmma.mma_async.sp multiplies 64 rows by 32 columns of a 2:4 weight, of which it takes the half that is kept from registers, four of a
thread, by rows of x in shared memory. A fragment weight is stored as those registers. A step is 64 columns: every thread copies its own
36 bytes of it to shared memory, some steps ahead, and reads them back when their turn comes; together the threads copy x.

A unit is a step of a tile, 64 rows for every four warps. A program takes U units one after the other, all of a tile before the next:
whole tiles on large layers, a share of one on small ones. A tile that several programs share is summed as parts.py says.
"""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

from dlpkit.kernels import parts
from dlpkit.kernels.early import early_start
from dlpkit.kernels.product import DTYPES, aligned, finish, grid
from dlpkit.kernels.runtime import multiprocessors
from dlpkit.kernels.scatter import barrier, opaque

FEWEST, MOST = 16, 128  # rows of x in a launch
STAGES = {  # warps -> M of the kernel -> steps in shared memory: H100, 14336 x 4096 and 4096 x 4096
    4: {16: 12, 32: 9, 64: 8, 128: 4},
    8: {64: 10, 128: 7},
}
RESIDENT = {4: 2, 8: 1}  # warps -> programs of a multiprocessor
STEP = gl.constexpr(4608)  # bytes of 64 rows and 64 columns
CODES = gl.constexpr(4096)  # of them before the positions

# $1 and $2: to and from of values, $3 and $4 of positions; without $5 nothing is read and zeros are written
COPY = gl.constexpr("""{ .reg .b32 few; shl.b32 few, $5, 2; cp.async.ca.shared.global [$3], [$4], 4, few;
    shl.b32 few, $5, 4; cp.async.cg.shared.global [$1], [$2], 16, few; cp.async.cg.shared.global [$1 + 2048], [$2 + 2048], 16, few;
    mov.b32 $0, 0; }""")
READ = gl.constexpr(
    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$9]; ld.shared.v4.b32 {$4, $5, $6, $7}, [$9 + 2048]; ld.shared.b32 $8, [$10];"
)


@functools.cache
def instructions(M: int, dtype: torch.dtype) -> dict[str, str]:
    """The PTX that multiplies a step by M rows of x, and its constraints.

    Operands: the sums, the same as inputs, eight registers of values, one of positions, the address of x, whether to add to the sums. The
    second instruction takes its positions from the other two threads of four. x has rows of 128 bytes with the swizzle of 128 bytes.
    """
    n = M // 2  # sums of a thread
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    sums = ", ".join(f"${i}" for i in range(n))
    values, positions, x, add = 2 * n, f"${2 * n + 8}", f"${2 * n + 9}", f"${2 * n + 10}"
    lines = [
        f".reg .pred p; setp.ne.s32 p, {add}, 0; .reg .b32 low, high; .reg .b64 x<2>;",
        f"shr.u32 low, {x}, 4; and.b32 low, low, 0x3fff; or.b32 low, low, 0x10000; mov.b32 high, 0x40000040;",
        "mov.b64 x0, {low, high}; add.s32 low, low, 4; mov.b64 x1, {low, high}; wgmma.fence.sync.aligned;",
    ]
    for i in range(2):
        four = ", ".join(f"${values + 4 * i + j}" for j in range(4))
        lines.append(
            f"wgmma.mma_async.sp.sync.aligned.m64n{M}k32.f32.{kind}.{kind} "
            f"{{{sums}}}, {{{four}}}, x{i}, {positions}, {i}, {'1' if i else 'p'}, 1, 1, 0;"
        )
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;")
    constraints = ["=f"] * n + [str(i) for i in range(n)] + ["r"] * 11
    return {"PTX": "{" + "\n".join(lines) + "}", "CONSTRAINTS": ",".join(constraints)}


@gluon.constexpr_function
def _floats(n):
    return tuple(gl.float32 for _ in range(n))


@gluon.constexpr_function
def _halvings(n):
    return n.bit_length() - 1


@gluon.jit
def _tile(sums, M: gl.constexpr):
    """The sums of all threads as a tile [rows, M]. Sum i of a thread: bit 0 is the column of two, bit 1 the row of two, then eights of columns."""
    WARPS: gl.constexpr = gl.num_warps()
    for _ in gl.static_range(_halvings(len(sums))):
        pairs = ()
        for i in gl.static_range(len(sums) // 2):
            pairs += (gl.join(sums[i], sums[i + len(sums) // 2]),)
        sums = pairs
    tile = sums[0].reshape([WARPS, 8, 4, M // 8, 2, 2]).permute((0, 4, 1, 3, 2, 5)).reshape([16 * WARPS, M])
    return gl.convert_layout(tile, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, M, 16]), assert_trivial=True)


@gluon.jit
def _copy(values_ptr, codes_ptr, to, stage, atom, t, atoms, T, live):
    """Step t of each thread's atom to a stage of its own shared memory, if it is `live`."""
    at = (gl.minimum(atom, atoms - 1) * T + t).to(gl.int64)
    offset = stage * (gl.num_warps() // 4 * STEP)
    gl.inline_asm_elementwise(
        COPY, "=r,r,l,r,l,r", [to[0] + offset, values_ptr + at * 1024, to[1] + offset, codes_ptr + at * 128, live.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _past(tile, t, T):
    """The unit after step t of a tile."""
    t += 1
    return gl.where(t == T, tile + 1, tile), gl.where(t == T, 0, t)


@gluon.jit
def _multiply(sums, mine, stage, x, add, PTX: gl.constexpr, CONSTRAINTS: gl.constexpr):
    TYPES: gl.constexpr = _floats(len(sums))
    offset = stage * (gl.num_warps() // 4 * STEP)
    slots = gl.inline_asm_elementwise(
        READ, "=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r", [mine[0] + offset, mine[1] + offset],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        PTX, CONSTRAINTS, sums + slots + (x, add.to(gl.int32)), dtype=TYPES, is_pure=False, pack=1
    )


@gluon.jit
def _fetch(to, x_ptr, m, k, column, x_rows, octets, stride_x):
    """Copy x[:, column : column + 64] to shared memory, zeros where x has none; `octets` of columns, `stride_x` in octets."""
    x = x_ptr + column + opaque(m).to(gl.int64)[:, None] * (stride_x * 8) + k[None, :]
    async_copy.async_copy_global_to_shared(to, x, mask=(m[:, None] < x_rows) & (k[None, :] < octets * 8 - column))
    async_copy.commit_group()


@gluon.jit
def _mma_kernel(
    x_ptr, values_ptr, codes_ptr, bias_ptr, y_ptr, parts_ptr,
    N, octets, x_rows, stride_x, atoms, T, units, U,
    M: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr, EARLY: gl.constexpr,
    PTX: gl.constexpr, CONSTRAINTS: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = WARPS // 4
    X: gl.constexpr = M * 128  # bytes of a stage
    W: gl.constexpr = GROUPS * STEP
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    pool = gl.allocate_shared_memory(DTYPE, [STAGES + (STAGES * W + X - 1) // X, M, 64], SHARED)  # x, then the weight
    room = gl.allocate_shared_memory(DTYPE, [M, 16 * WARPS], SHARED)
    # the first allocation, because it is the largest
    base = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    m = gl.arange(0, M, gl.SliceLayout(1, COPY_X))
    k = gl.arange(0, 64, gl.SliceLayout(0, COPY_X))
    group = gl.arange(0, 32 * WARPS, LANES) // 128
    lane = gl.arange(0, 32 * WARPS, LANES) % 128
    values_ptr += lane * 4
    codes_ptr += lane
    mine = base + STAGES * X + group * STEP
    mine = mine + lane * 16, mine + CODES + lane * 4

    first_unit = gl.program_id(0) * U
    last = gl.minimum(first_unit + U, units)
    tile = first_unit // T
    t = first_unit - tile * T
    next_tile, next_t = tile, t
    for i in gl.static_range(STAGES - 1):
        _copy(values_ptr, codes_ptr, mine, i, next_tile * GROUPS + group, next_t, atoms, T, first_unit + i < last)
        next_tile, next_t = _past(next_tile, next_t, T)
    grid("wait", EARLY)
    next_tile, next_t = tile, t
    for i in gl.static_range(STAGES - 1):
        _fetch(pool.index(i), x_ptr, m, k, next_t * 64, gl.where(first_unit + i < last, x_rows, 0), octets, stride_x)
        next_tile, next_t = _past(next_tile, next_t, T)
    sums = (gl.zeros([32 * WARPS], gl.float32, LANES),) * (M // 2)
    stage = 0
    for unit in range(first_unit, last):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()  # all warps have their step, and are done with the one before
        live = unit + STAGES - 1 < last
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        _copy(values_ptr, codes_ptr, mine, free, next_tile * GROUPS + group, next_t, atoms, T, live)
        _fetch(pool.index(free), x_ptr, m, k, next_t * 64, gl.where(live, x_rows, 0), octets, stride_x)
        next_tile, next_t = _past(next_tile, next_t, T)
        sums = _multiply(sums, mine, stage, base + stage * X, (unit > first_unit) & (t > 0), PTX, CONSTRAINTS)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        t += 1
        if unit == last - 1:
            grid("launch_dependents", EARLY)
        if (unit == last - 1) | (t == T):
            if SPLIT:
                parts.put(_tile(sums, M), tile, parts_ptr)
            else:
                finish(_tile(sums, M), room, tile, bias_ptr, y_ptr, N, x_rows, BIAS)
            tile += 1
            t = 0


def multiply(
    x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None, N: int, K: int
) -> torch.Tensor:  # fmt: skip
    """x [M, K] and the fields of a Fragment, values of x's 16-bit dtype -> [M, N]."""
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    x = aligned(x)
    early = early_start(x.device)
    for i in range(0, x.shape[0], MOST):
        part = x[i : i + MOST]
        M = max(FEWEST, triton.next_power_of_2(part.shape[0]))
        warps, U = share(N, K, M, multiprocessors(x.device))
        T, tiles = triton.cdiv(K, 64), triton.cdiv(N, 16 * warps)
        programs = triton.cdiv(tiles * T, U)
        split = U % T != 0
        sums = parts.allocate(tiles, programs, 16 * warps, M, x.device) if split else y
        _mma_kernel[(programs,)](
            part, values.view(torch.int32), codes, y if bias is None else bias, y[i:], sums,
            N, triton.cdiv(K, 8), part.shape[0], x.stride(0) // 8, triton.cdiv(N, 64), T, tiles * T, U,
            M=M, STAGES=STAGES[warps][M], DTYPE=DTYPES[x.dtype], BIAS=bias is not None, SPLIT=split,
            **instructions(M, x.dtype), **early, num_warps=warps,
        )  # fmt: skip
        if split:
            parts.add(sums, y[i : i + MOST], bias, 16 * warps, M, T, U)
    return y


def share(N: int, K: int, M: int, sms: int) -> tuple[int, int]:
    """Warps of a program and its units: tall tiles read x less often, and are for many rows of x where they keep the GPU busy."""
    warps = 8 if M in STAGES[8] and 2 * triton.cdiv(N, 128) > sms else 4
    parts = max(1, RESIDENT[warps] * sms // triton.cdiv(N, 16 * warps))
    return warps, triton.cdiv(triton.cdiv(K, 64), parts)
