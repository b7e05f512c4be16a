"""The order of the rows of sell on the GPU: see `arrange_ref` in formats/sell.py for what it is.

Sorting by counting: the place of a row in its group is the number of rows there that come before it. That is N ** 2 comparisons to
begin with and less for every wave, as groups shrink, and costs less than one launch of a library's sort. A group is a range of places.
"""

import torch
import triton
import triton.language as tl

BLOCK, OTHERS = 8, 256  # rows of a program, and rows compared with them at a time


@triton.jit
def _level_kernel(
    pairs_ptr, out_ptr,  # [N] int64; [3, N] int32 by place: its row, and the places at which its group starts and stops
    N,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(pairs_ptr + row, mask=row < N, other=0).to(tl.int32)[:, None]
    longer, equal = tl.zeros([BLOCK, OTHERS], tl.int32), tl.zeros([BLOCK, OTHERS], tl.int32)
    earlier = tl.zeros([BLOCK, OTHERS], tl.int32)
    for begin in range(0, N, OTHERS):
        other = begin + tl.arange(0, OTHERS)[None, :]
        theirs = tl.load(pairs_ptr + other, mask=other < N, other=-1).to(tl.int32)
        longer += (theirs > mine).to(tl.int32)
        equal += (theirs == mine).to(tl.int32)
        earlier += ((theirs == mine) & (other < row[:, None])).to(tl.int32)
    start = tl.sum(longer, 1)
    place = start + tl.sum(earlier, 1)
    tl.store(out_ptr + place, row, mask=row < N)
    tl.store(out_ptr + N + place, start, mask=row < N)
    tl.store(out_ptr + 2 * N + place, start + tl.sum(equal, 1), mask=row < N)


@triton.jit(do_not_specialize=["wave", "parts"])
def _wave_kernel(
    key_ptr, in_ptr, out_ptr,  # [N, WAVES] float32; as in _level_kernel
    N, WAVES, wave, parts,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < N
    row = tl.load(in_ptr + place, mask=there, other=0)
    start = tl.load(in_ptr + N + place, mask=there, other=N)
    stop = tl.load(in_ptr + 2 * N + place, mask=there, other=0)
    mine = tl.load(key_ptr + row * WAVES + wave, mask=there, other=0.0)[:, None]
    before = tl.zeros([BLOCK, OTHERS], tl.int32)
    end = tl.max(stop, 0)
    for begin in range(tl.min(start, 0), end, OTHERS):
        at = begin + tl.arange(0, OTHERS)[None, :]
        other = tl.load(in_ptr + at, mask=at < end, other=0)
        theirs = tl.load(key_ptr + other * WAVES + wave, mask=at < end, other=0.0)
        first = (theirs < mine) | ((theirs == mine) & (other < row[:, None]))
        before += (first & (at >= start[:, None]) & (at < stop[:, None])).to(tl.int32)
    within = tl.sum(before, 1)
    size = tl.maximum(stop - start, 1)
    part = within * parts // size
    out = out_ptr + start + within
    tl.store(out, row, mask=there)
    tl.store(out + N, start + (part * size + parts - 1) // parts, mask=there)
    tl.store(out + 2 * N, start + ((part + 1) * size + parts - 1) // parts, mask=there)


def arrange(pairs: torch.Tensor, components: torch.Tensor, splits: tuple[int, ...]) -> torch.Tensor:
    """[N] int64 pairs that a lane of each row needs, [N, WAVES] float32 -> the rows in order [N] int32."""
    N, waves = components.shape
    places, spare = torch.empty(2, 3, N, dtype=torch.int32, device=pairs.device)
    grid = (triton.cdiv(N, BLOCK),)
    options = {"BLOCK": BLOCK, "OTHERS": OTHERS, "num_warps": 4}
    with torch.cuda.device_of(pairs):
        _level_kernel[grid](pairs, places, N, **options)
        for wave, parts in enumerate(splits):
            _wave_kernel[grid](components, places, spare, N, waves, wave, parts, **options)
            places, spare = spare, places
    return places[0]
