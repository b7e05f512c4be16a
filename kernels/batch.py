"""y = x W^T + bias for a tile weight and up to 128 rows of x: nonzeros scatter into shared memory, tensor cores multiply.

A unit is a tile of rows by 256 columns. A program takes U units one after the other, all blocks of a tile before the next tile. It clears
the tile, scatters the block's values into it and multiplies it by the rows of x, wgmma with both operands in shared memory. A tile
whose blocks several programs share is summed by the last of them to arrive, from float32 parts in the order of the programs: the same
sum every time.

Here several programs share a multiprocessor, with tiles of 64 rows, so that some multiply while others scatter: for few rows of x. For more
see special.py.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dlpkit.kernels import special
from dlpkit.kernels.product import fetch, finish, join
from dlpkit.kernels.runtime import multiprocessors
from dlpkit.kernels.scatter import COLUMNS, barrier, begin, clear, opaque, proceed, put_extras, walk, walker

LAUNCH = {"batch": (16, 64), "special": (64, 128)}  # kernel -> fewest and most rows of x in a launch
RESIDENT = {16: 4, 32: 4, 64: 3}  # M of the kernel -> programs of a multiprocessor: H100, 14336 x 4096
REGISTERS = {16: 128, 32: 128, 64: 168}  # of a thread
ROWS = gl.constexpr(64)  # of a tile
ROUNDS = gl.constexpr(4)  # of extras that are read ahead, one to a thread
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _batch_kernel(
    x_ptr, values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr,
    N, octets, x_rows, stride_x, atoms, B, units, U,
    M: gl.constexpr, DTYPE: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    w = gl.allocate_shared_memory(DTYPE, [1, COLUMNS, ROWS], SHARED)
    xs = gl.allocate_shared_memory(DTYPE, [4, M, 64], SHARED)
    m = gl.arange(0, M, gl.SliceLayout(1, COPY))
    k = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    lane, half, me = walker(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])), 0)

    first_unit = gl.program_id(0) * U
    last = gl.minimum(first_unit + U, units)
    tile, b, steps, stream, ring, extras = begin(
        values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, first_unit, atoms, B, half, lane, ROUNDS
    )  # fmt: skip
    acc = gl.zeros([ROWS, M], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16]))
    for unit in range(first_unit, last):
        for i in gl.static_range(4):
            fetch(xs.index(i), x_ptr, m, k, b * COLUMNS + 64 * i, x_rows, octets, stride_x)
        clear(me, 4)
        barrier()
        put_extras(extras_ptr, places_ptr, extras, lane, me, ROUNDS)
        stream, ring = walk(stream, ring, steps, me)

        fresh = (unit == first_unit) | (b == 0)
        ends = (unit == last - 1) | (b == B - 1)
        done = tile
        tile, b, steps, extras = proceed(
            extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, tile, b, unit < last - 1, atoms, B, half, lane, ROUNDS
        )  # fmt: skip

        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        buffer = opaque(0)
        for i in gl.static_range(4):
            acc = warpgroup_mma(
                w.index(buffer).slice(64 * i, 64, 0).permute((1, 0)), xs.index(buffer + i).permute((1, 0)), acc,
                use_acc=(fresh == 0) if i == 0 else True, is_async=True,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        if ends:
            if SPLIT:
                join(acc, xs, done, bias_ptr, y_ptr, parts_ptr, arrived_ptr, N, x_rows, B, U, BIAS)
            else:
                finish(acc, xs, done, bias_ptr, y_ptr, N, x_rows, BIAS)


def multiply(
    kernel: str, x: torch.Tensor, values: torch.Tensor, gaps: torch.Tensor, extras: torch.Tensor, places: torch.Tensor,
    starts: torch.Tensor, extra_starts: torch.Tensor, arrived: torch.Tensor, bias: torch.Tensor | None, N: int, K: int,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] and the fields of a Tile, values of x's 16-bit dtype -> [M, N], by one of LAUNCH."""
    fewest, most = LAUNCH[kernel]
    few = kernel == "batch"
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    x = aligned(x)
    weight = values.view(torch.int32), gaps, extras.view(torch.int16), places, starts, extra_starts
    for i in range(0, x.shape[0], most):
        part = x[i : i + most]
        M = max(fewest, triton.next_power_of_2(part.shape[0]))
        rows = ROWS.value if few else special.ROWS.value
        atoms, B, tiles = triton.cdiv(N, 64), triton.cdiv(K, COLUMNS.value), triton.cdiv(N, rows)
        sms = multiprocessors(x.device)
        U = triton.cdiv(tiles * B, RESIDENT[M] * sms) if few else special.units(tiles, B, sms)
        programs = triton.cdiv(tiles * B, U)
        split = U % B != 0
        parts = torch.empty((programs + tiles) * rows * M if split else 1, dtype=torch.float32, device=x.device)
        options = {"M": M, "DTYPE": DTYPES[x.dtype], "BIAS": bias is not None, "SPLIT": split, "num_warps": 4}
        if few:
            launched, options["maxnreg"] = _batch_kernel, REGISTERS[M]
        else:
            launched = special.special_kernel
            options |= {"STAGES": special.STAGES[M], "REGISTERS": special.REGISTERS}
        launched[(programs,)](
            part, *weight, y if bias is None else bias, y[i:], parts, arrived,
            N, triton.cdiv(K, 8), part.shape[0], x.stride(0) // 8, atoms, B, tiles * B, U, **options,
        )  # fmt: skip
    return y


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that are whole 16-byte words; columns past K hold zeros."""
    if x.shape[1] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
