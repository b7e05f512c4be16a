"""Device code: the rank of every score within its small group, as the number of those that come before it."""

import triton
import triton.language as tl

WIDTH = tl.constexpr(8)  # scores of a thread: those of its group in the threads beside it travel once


@triton.jit
def _before(x, other, member, ties, OWN: tl.constexpr):
    """Bits x and other [G, A, B, W] -> for each of x how many of those along the last axis of other are smaller, or equal where ties."""
    before = tl.zeros_like(x)
    for i in tl.static_range(x.shape[3]):
        value = tl.sum(tl.where(member == i, other, 0), 3, keep_dims=True)
        if OWN:
            ties = (i < member).to(tl.int32)
        before += ((value - x - ties).to(tl.uint32, bitcast=True) >> 31).to(
            tl.int32
        )  # a sign costs less than a comparison
    return before


@triton.jit
def ranks(x, SIZE: tl.constexpr):
    """Bits x [G, SIZE], not negative -> int32 [G, SIZE]: 0 for the smallest of every row, of equal ones for the one further left."""
    W: tl.constexpr = SIZE if SIZE < WIDTH else WIDTH
    B: tl.constexpr = 2 if SIZE > WIDTH else 1
    A: tl.constexpr = SIZE // (W * B)
    tl.static_assert(A <= 2)
    shape: tl.constexpr = x.shape
    x = tl.reshape(x, (shape[0], A, B, W))
    member = tl.arange(0, W)[None, None, None, :]
    before = _before(x, x, member, 0, True)
    if B > 1:  # the other half of 16
        b = tl.arange(0, B)[None, None, :, None]
        beside = tl.sum(x, 2, keep_dims=True) - x
        before += _before(x, beside, member, b, False)
        if A > 1:  # both halves of the other 16
            a = tl.arange(0, A)[None, :, None, None]
            before += _before(x, tl.sum(x, 1, keep_dims=True) - x, member, a, False)
            before += _before(x, tl.sum(beside, 1, keep_dims=True) - beside, member, a, False)
    return tl.reshape(before, shape)
