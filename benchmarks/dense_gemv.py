"""The honest rival at M = 1: a dense matrix-vector product in Triton, 1.05 to 1.2 times faster than cuBLAS on large layers."""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.early import early_start, inputs_ready, let_next_start


@triton.jit
def _tile(w_ptr, row, k, N, K):
    mask = (row < N)[:, None] & (k < K)[None, :]
    at = w_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _gemv_kernel(
    x_ptr, w_ptr, y_ptr,  # [K], [N, K], [N]
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w = _tile(w_ptr, row, k, N, K)
    inputs_ready(EARLY)
    acc = w * tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK_K, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        acc += _tile(w_ptr, row, k, N, K) * tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    let_next_start(EARLY)
    tl.store(y_ptr + row, tl.sum(acc, 1).to(y_ptr.dtype.element_ty), mask=row < N)


def gemv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[1, K], contiguous [N, K] -> [1, N]."""
    N, K = weight.shape
    y = torch.empty(1, N, dtype=x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(N, 2),)](
        x, weight, y, N, K, BLOCK_N=2, BLOCK_K=1024, num_warps=4, **early_start(x.device)
    )
    return y
