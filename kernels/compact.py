"""A dense weight to the layout on disk and back on the GPU: see storage.py for the layout.

A row to a warp, which walks its columns in blocks and carries the values before them. Encoding reads the weight twice, for the
mask and the counts, then for the values, because the rows before a row decide where it starts. Values travel as integers of
their width, so -0.0 and NaN survive.
"""

import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 1024, 1  # columns at a time


@triton.jit
def _mask_kernel(
    w_ptr, mask_ptr, counts_ptr,  # [N, K] integer, [N, OCTETS] uint8, [N] int64
    K, OCTETS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        keep = (tl.load(w_ptr + row * K + col, mask=col < K, other=0) != 0).to(tl.int32)
        bits = tl.reshape(keep, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
        octet = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(mask_ptr + row * OCTETS + octet, tl.sum(bits, 1).to(tl.uint8), mask=octet < OCTETS)
        count += tl.sum(keep)
    tl.store(counts_ptr + row, count)


@triton.jit
def _values_kernel(
    w_ptr, offsets_ptr, values_ptr,  # [N, K] integer, [N + 1] int64, [nnz]
    K,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(offsets_ptr + row).to(tl.int64)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(w_ptr + row * K + col, mask=col < K, other=0)
        keep = (value != 0).to(tl.int32)
        tl.store(values_ptr + before + tl.cumsum(keep, 0) - 1, value, mask=value != 0)
        before += tl.sum(keep)


@triton.jit
def _dense_kernel(
    mask_ptr, offsets_ptr, values_ptr, out_ptr,  # [N, OCTETS] uint8, [N + 1], [nnz] integer, [N, K]
    K, OCTETS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(offsets_ptr + row).to(tl.int64)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        octet = tl.load(mask_ptr + row * OCTETS + col // 8, mask=col < K, other=0).to(tl.int32)
        keep = (octet >> (col % 8)) & 1
        value = tl.load(values_ptr + before + tl.cumsum(keep, 0) - 1, mask=keep != 0, other=0)
        tl.store(out_ptr + row * K + col, value, mask=col < K)
        before += tl.sum(keep)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] contiguous, of an integer dtype -> values [nnz], mask [N, ceil(K / 8)] uint8, offsets [N + 1] int64."""
    N, K = weight.shape
    octets = -(-K // 8)
    mask = torch.empty(N, octets, dtype=torch.uint8, device=weight.device)
    counts = torch.zeros(N + 1, dtype=torch.int64, device=weight.device)
    with torch.cuda.device_of(weight):
        _mask_kernel[(N,)](weight, mask, counts[1:], K, octets, BLOCK=BLOCK, num_warps=NUM_WARPS)
        offsets = counts.cumsum(0)
        values = torch.empty(int(offsets[-1]), dtype=weight.dtype, device=weight.device)
        _values_kernel[(N,)](weight, offsets, values, K, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return values, mask, offsets


def decode(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, K: int) -> torch.Tensor:
    """The same three, offsets int32 or int64 -> [N, K]."""
    out = torch.empty(mask.shape[0], K, dtype=values.dtype, device=values.device)
    with torch.cuda.device_of(out):
        _dense_kernel[(mask.shape[0],)](mask, offsets, values, out, K, mask.shape[1], BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out
