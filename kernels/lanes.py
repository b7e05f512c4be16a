"""What every lane of the packed formats does: streams words past L1, widens 16-bit floats, adds into up to eight rows of x."""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.early import early_start, inputs_ready, let_next_start
from dlpkit.kernels.runtime import multiprocessors

ROWS = 8  # rows of x that one launch takes
REGISTER_FILE = 65536  # registers of a multiprocessor
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def stream_words(p, PTX: tl.constexpr):
    """Four int32 from each of the 16-byte aligned addresses [L], not kept in L1."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [p],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)


@triton.jit
def stream_word(p, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.b32 $0, [$1];", "=r,l", [p], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.load(p)


@triton.jit
def low(pair, DTYPE: tl.constexpr):
    """The first of two 16-bit floats in an int32, as float32."""
    if tl.bfloat16 == DTYPE:
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high(pair, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zeros(L: tl.constexpr, M: tl.constexpr):
    z = tl.zeros([L], tl.float32)
    if M == 1:  # noqa: SIM116
        return (z,)
    elif M == 2:
        return z, z
    elif M == 4:
        return z, z, z, z
    else:
        return z, z, z, z, z, z, z, z


@triton.jit
def _words(x, PLANE: tl.constexpr, M: tl.constexpr, PTX: tl.constexpr):
    """The M / 2 words of a column, PLANE apart, or side by side when PLANE is 0."""
    if PLANE != 0 and M == 4:
        return tl.load(x), tl.load(x + PLANE)
    elif PLANE != 0:
        return tl.load(x), tl.load(x + PLANE), tl.load(x + 2 * PLANE), tl.load(x + 3 * PLANE)
    elif PTX and M == 4:
        return tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [x], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    elif PTX:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [x],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    elif M == 4:
        return tl.load(x), tl.load(x + 1)
    else:
        return tl.load(x), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3)


@triton.jit
def add(acc, w, x, stride_x, PLANE: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """acc[m] + w * x[m]; x [L] points into rows, `stride_x` apart, or for M > 2 at a column of words of two rows."""
    if M == 1:
        return (acc[0] + w * tl.load(x).to(tl.float32),)
    elif M == 2:
        return acc[0] + w * tl.load(x).to(tl.float32), acc[1] + w * tl.load(x + stride_x).to(tl.float32)
    elif M == 4:
        words = _words(x, PLANE, M, PTX)
        return (
            acc[0] + w * low(words[0], DTYPE), acc[1] + w * high(words[0], DTYPE),
            acc[2] + w * low(words[1], DTYPE), acc[3] + w * high(words[1], DTYPE),
        )  # fmt: skip
    else:
        words = _words(x, PLANE, M, PTX)
        return (
            acc[0] + w * low(words[0], DTYPE), acc[1] + w * high(words[0], DTYPE),
            acc[2] + w * low(words[1], DTYPE), acc[3] + w * high(words[1], DTYPE),
            acc[4] + w * low(words[2], DTYPE), acc[5] + w * high(words[2], DTYPE),
            acc[6] + w * low(words[3], DTYPE), acc[7] + w * high(words[3], DTYPE),
        )  # fmt: skip


@triton.jit
def finish(
    acc, row, bias, y_ptr, N, x_rows,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Add the segments of each row [R], then its bias, and store; rows from N on do not exist."""
    for m in tl.static_range(M):
        y = tl.sum(tl.reshape(acc[m], (S, R)), 0) + bias
        tl.store(y_ptr + m * N + row, y.to(y_ptr.dtype.element_ty), mask=(row < N) & (m < x_rows))


@triton.jit
def _pair_kernel(
    x_ptr, out_ptr,  # [x_rows, K], int32
    K, x_rows, stride_xm, stride_xk, stride_op, stride_ok,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    inputs_ready(EARLY)
    pair = tl.program_id(1)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = x_ptr + 2 * pair * stride_xm + k * stride_xk
    first = tl.load(at, mask=(k < K) & (2 * pair < x_rows), other=0.0).to(tl.int16, bitcast=True)
    second = tl.load(at + stride_xm, mask=(k < K) & (2 * pair + 1 < x_rows), other=0.0).to(tl.int16, bitcast=True)
    word = (second.to(tl.int32) << 16) | (first.to(tl.int32) & 0xFFFF)
    tl.store(out_ptr + pair * stride_op + k * stride_ok, word, mask=k < K)


def rows_of(x: torch.Tensor, planes: bool) -> tuple[torch.Tensor, int, int]:
    """Up to eight rows [M, K] of any strides -> what `add` reads, M rounded up to a power of two, and PLANE.

    One or two rows are read as they are. More come as words of two rows, zero where x lacks one: [M / 2, PLANE] in planes, else
    [K, M / 2] with the words of a column side by side and PLANE 0.
    """
    x_rows, K = x.shape
    M = triton.next_power_of_2(x_rows)
    if M <= 2:
        return (x if x.stride(1) == 1 else x.contiguous()), M, 0
    plane = triton.next_power_of_2(K) if planes else 0
    out = torch.empty((M // 2, plane) if planes else (K, M // 2), dtype=torch.int32, device=x.device)
    stride = out.stride() if planes else out.stride()[::-1]
    block = 256
    _pair_kernel[triton.cdiv(K, block), M // 2](
        x, out, K, x_rows, *x.stride(), *stride, BLOCK=block, num_warps=2, **early_start(x.device)
    )
    return out, M, plane


def launch(programs: int, lanes: int, M: int, fewest: int, crowded: int, device: torch.device) -> dict[str, int]:
    """Warps, one lane to a thread, an early start where there is one, and from M = 4 the registers of a thread.

    They are as many as let all programs be resident at once, if that is `fewest` or more, else `crowded`.
    """
    warps = max(1, lanes // 32)
    options = {"num_warps": warps, **early_start(device)}
    if M < 4:
        return options
    threads = triton.cdiv(programs, multiprocessors(device)) * 32 * warps  # of a multiprocessor, if all are resident
    fit = REGISTER_FILE // threads // 8 * 8
    return {**options, "maxnreg": min(64, fit) if fit >= fewest else crowded}
