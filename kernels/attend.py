"""Attention of one query per head over a cache of fixed length: what a decoding step needs, split along the cache.

out[b, h] = softmax(scale q[b, h] K[b, g]^T + bias[b]) V[b, g], where g is the key head that query head h shares with its group. A program
takes the queries of one group, so that keys and values are read once whatever the group's size, and a stretch of the cache, so that
a single sequence fills the GPU (Flash-Decoding). It skips blocks in which no slot may be seen. A second kernel merges the stretches by
their log-sum-exp. Bound by the bytes of keys and values.
"""

import contextlib

import torch
import triton
import triton.language as tl

from dlpkit.kernels.runtime import INTERPRET, multiprocessors, use_triton

BLOCK_L, NUM_WARPS = 64, 4  # H100, 8 key heads of 128, 512 and 2304 slots
ROWS = 16  # the fewest rows that tl.dot takes
# of the products; the interpreter cannot multiply bfloat16
DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRET else tl.bfloat16,
}


def attend_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    B, H, D = q.shape
    grouped = q.view(B, k.shape[1], -1, D).float()
    scores = grouped @ k.float().transpose(2, 3) * scale + bias.float()[:, None, None]
    return (scores.softmax(-1) @ v.float()).reshape(B, H, -1).to(q.dtype)


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # [B, H, D], [B, heads, L, D] twice, [B, L]
    out_ptr, lse_ptr,  # [B, heads * G, splits, D], [B, heads * G, splits] float32
    heads, G, L, D, scale, lowest, stretch,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_bb,
    BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    b, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask_q = (offs_g < G)[:, None] & (offs_d < D)[None, :]
    at_q = b * stride_qb + (head * G + offs_g)[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_ptr + at_q, mask=mask_q, other=0.0).to(DTYPE)  # [BLOCK_G, BLOCK_D]
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(split * stretch, min(L, (split + 1) * stretch), BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        bias = tl.load(bias_ptr + b * stride_bb + offs_l, mask=offs_l < L, other=float("-inf")).to(tl.float32)
        if tl.max(bias, 0) > lowest:
            mask = (offs_l < L)[:, None] & (offs_d < D)[None, :]
            at_k = b * stride_kb + head * stride_kh + offs_l[:, None].to(tl.int64) * stride_kl + offs_d[None, :]
            at_v = b * stride_vb + head * stride_vh + offs_l[:, None].to(tl.int64) * stride_vl + offs_d[None, :]
            k = tl.load(k_ptr + at_k, mask=mask, other=0.0).to(DTYPE)  # [BLOCK_L, BLOCK_D]
            v = tl.load(v_ptr + at_v, mask=mask, other=0.0).to(DTYPE)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]  # [BLOCK_G, BLOCK_L]
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            fade = tl.exp(top - higher)
            total = total * fade + tl.sum(weights, 1)
            acc = acc * fade[:, None] + tl.dot(weights.to(DTYPE), v, input_precision="ieee")
            top = higher
    seen = total > 0
    row = (pair.to(tl.int64) * G + offs_g) * tl.num_programs(1) + split
    tl.store(lse_ptr + row, tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), float("-inf")), mask=offs_g < G)
    out = acc / tl.where(seen, total, 1.0)[:, None]
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], out, mask=mask_q)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, y_ptr,  # [rows, splits, D], [rows, splits] float32, [rows, D]; a row is a query head of a sequence
    splits, D,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask = (offs_s < splits)[:, None] & (offs_d < D)[None, :]
    out = tl.load(out_ptr + (row * splits + offs_s)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + row * splits + offs_s, mask=offs_s < splits, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, 0))  # [BLOCK_S]
    y = tl.sum(out * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=offs_d < D)


@torch.library.custom_op("dlpkit::attend", mutates_args=())
def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    B, H, D = q.shape
    heads, L = k.shape[1], k.shape[2]
    splits = max(1, min(triton.cdiv(L, BLOCK_L), multiprocessors(q.device) // (B * heads)))
    stretch = triton.cdiv(triton.cdiv(L, splits), BLOCK_L) * BLOCK_L
    out = torch.empty(B, H, splits, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    y = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    q, k, v, bias = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, bias))
    wide = max(ROWS, triton.next_power_of_2(D))
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _attend_kernel[B * heads, splits](
            q, k, v, bias,
            out, lse,
            heads, H // heads, L, D, scale, torch.finfo(bias.dtype).min / 2, stretch,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], bias.stride(0),
            BLOCK_G=max(ROWS, triton.next_power_of_2(H // heads)), BLOCK_L=BLOCK_L, BLOCK_D=wide,
            DTYPE=DTYPES[q.dtype], num_warps=NUM_WARPS,
        )  # fmt: skip
        _merge_kernel[(B * H,)](
            out, lse, y,
            splits, D,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=wide, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


@_attend.register_fake
def _attend_fake(q, k, v, bias, scale):
    return q.new_empty(q.shape)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """q [B, H, D], k and v [B, heads, L, D] of one float dtype, bias [B, L] -> [B, H, D]. H is a multiple of heads.

    A slot whose bias is the least number of its dtype is not seen; every row sees at least one.
    """
    B, H, D = q.shape
    heads, L = k.shape[1], k.shape[2]
    if k.shape != (B, heads, L, D) or v.shape != k.shape or bias.shape != (B, L) or H % heads:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v, bias))
        raise ValueError(f"attend wants q [B, H, D], k and v [B, heads, L, D] and bias [B, L], got {shapes}")
    if not use_triton(q, k, v, bias):
        return attend_ref(q, k, v, bias, scale)
    return torch.ops.dlpkit.attend(q, k, v, bias, scale)
