"""The columns of a block from left to right, its rows in registers: see sweep.py for what happens to them."""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.ranks import ranks

TILE, NUM_WARPS = 2048, 4  # weights of a program


@triton.jit
def _largest(w, scale, n, R: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr):
    """w [R, BLOCK], scale [BLOCK] -> bool [R, BLOCK], the n largest |w| * scale of every M columns; of equal ones those further right."""
    x = tl.reshape((tl.abs(w) * scale[None, :]).to(tl.int32, bitcast=True), (R * BLOCK // M, M))
    return tl.reshape(ranks(x, M), (R, BLOCK)) >= M - n


@triton.jit
def _sweep_kernel(
    w_ptr, errors_ptr, kept_ptr, factor_ptr,  # [N, C], [N, C], [N, C] bool, [C, C]
    N, C, n, stride_w, stride_kept, stride_uj, stride_uk,
    R: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None].to(tl.int64)
    col = tl.arange(0, BLOCK)
    there = (row < N) & (col < C)[None, :]
    w = tl.load(w_ptr + row * stride_w + col[None, :], mask=there, other=0.0)
    errors = tl.zeros_like(w)
    if M:
        kept = tl.zeros([R, BLOCK], tl.int1)
        scale = 1 / tl.load(factor_ptr + col * (stride_uj + stride_uk), mask=col < C, other=1.0)
    else:
        kept = tl.load(kept_ptr + row * stride_kept + col[None, :], mask=there, other=1).to(tl.int1)
    for j in range(C):
        if M:  # noqa: SIM102 (a constant, the other is not)
            if j % M == 0:
                kept = tl.where((col // M == j // M)[None, :], _largest(w, scale, n, R, BLOCK, M), kept)
        u = tl.load(factor_ptr + j * stride_uj + col * stride_uk, mask=(col >= j) & (col < C), other=0.0)  # [BLOCK]
        here = (col == j)[None, :]
        gone = tl.sum(tl.where(here & ~kept, w, 0.0), 1)  # [R]
        error = gone / tl.load(factor_ptr + j * (stride_uj + stride_uk))
        errors = tl.where(here, error[:, None], errors)
        w -= error[:, None] * u[None, :]
    tl.store(w_ptr + row * stride_w + col[None, :], tl.where(kept, w, 0.0), mask=there)
    tl.store(errors_ptr + row * C + col[None, :], errors, mask=there)


def sweep_(block: torch.Tensor, factor: torch.Tensor, kept: torch.Tensor | None, n: int, m: int) -> torch.Tensor:
    """As `sweep.sweep_`."""
    N, C = block.shape
    errors = torch.empty(N, C, device=block.device)
    width = triton.next_power_of_2(C)
    rows = max(1, TILE // width)
    with torch.cuda.device_of(block):
        _sweep_kernel[(triton.cdiv(N, rows),)](
            block, errors, block if kept is None else kept, factor,
            N, C, n, block.stride(0), 0 if kept is None else kept.stride(0), *factor.stride(),
            R=rows, BLOCK=width, M=m, num_warps=NUM_WARPS,
        )  # fmt: skip
    return errors
