"""Blocks of 64 rows and 256 columns whose nonzeros scatter into a dense tile of shared memory. For batches on Hopper GPUs.

A **run** is one place of all lines of that tile, a line to a column: wgmma wants line k swizzled, so run r has the weight of row
r ^ (k % 8 * 8) in column k. The first half of its nonzeros is walked up from k = 0 and the rest down from k = 255, by two **lanes**, which
halves the longest walk at no cost in bytes. A slot is a value and its distance from the slot before it, 0 to 15; a longer jump passes
through filler slots (distance 15, value 0). Slots that hold no weight have all value bits zero; a stored weight never has, so -0.0
survives.

All 128 lanes of a block, and those of the other block of the same columns in 128 rows, take the same number of steps of 8 slots.
Short lanes begin with padding (distance 0, value 0), whose zero the first weight at that place replaces; what does not fit long
lanes, the weights in the middle of the run, are **extras**, each with its place. The steps are those that take the fewest bytes. As runs
pass through all rows of a block, masks that keep as many weights in every row of it (`0.5@256`) take hardly fewer than others.

    lane    end * 64 + run % 2 * 32 + run // 2: the lanes of a warp, however far they have come, store to 32 different banks
    values  [block][step][lane][8], blocks row by row
    gaps    [block][step][lane] int32, slot j in the four bits from 8 * (j % 4) + 4 * (j // 4): one product sums four distances
    extras  [block][extra], and as long, places: that in the tile, k * 64 + run; in fours, filled up with zeros whose place is -1

20 bits per slot, 32 per extra. One product with a weight at a time: the programs of a launch count each other in `arrived`, so two
streams must not multiply by the same Tile at once.
"""

from dataclasses import dataclass

import torch

from dlpkit.kernels.formats._operator import ByOperator
from dlpkit.kernels.runtime import HAS_TRITON, use_triton
from dlpkit.kernels.storage import BITS, check_matrix

if HAS_TRITON:
    from dlpkit.kernels import blocks, ops  # noqa: F401 (ops registers torch.ops.dlpkit)

ROWS, COLUMNS = 64, 256  # of a block
LANES = 2 * ROWS
FAR = 15  # the largest distance between two slots
STEP_BYTES, EXTRA_BYTES = 20 * LANES, 4  # with 16-bit values
MOST = 32  # more steps than any block needs
CHUNK = 2**22  # weights packed at a time


@dataclass(frozen=True)
class Tile(ByOperator):
    values: torch.Tensor  # [starts[-1] * 128 * 8], dtype of the weight
    gaps: torch.Tensor  # [starts[-1] * 128] int32
    extras: torch.Tensor  # [extra_starts[-1]], dtype of the weight
    places: torch.Tensor  # [extra_starts[-1]] int16
    starts: torch.Tensor  # [blocks + 1] int32, steps before each block
    extra_starts: torch.Tensor  # [blocks + 1] int32
    arrived: torch.Tensor  # [ceil(N / 64)] int32, zeros with which the programs of a matmul count each other
    N: int
    K: int

    def _fields(self) -> tuple:
        tensors = self.values, self.gaps, self.extras, self.places, self.starts, self.extra_starts, self.arrived
        return *tensors, self.N, self.K

    def _decoded(self) -> torch.Tensor:
        return unpack_ref(self)


def pack(weight: torch.Tensor) -> Tile:
    """[N, K] of any float dtype -> Tile on the same device. Raises ValueError unless the weight has rows and columns."""
    check_matrix(weight, "tile")
    weight = weight.detach().contiguous()
    if not use_triton(weight):
        return pack_ref(weight)
    values, gaps, extras, *others = blocks.pack(weight.view(BITS[weight.element_size()]))
    values, extras = values.view(weight.dtype), extras.view(weight.dtype)
    return Tile(values, gaps, extras, *others, _arrived(weight), *weight.shape)


def pack_ref(weight: torch.Tensor) -> Tile:
    N, K = weight.shape
    rows = max(1, CHUNK // K // (2 * ROWS)) * 2 * ROWS
    parts = [_pack_rows(part) for part in weight.split(rows)]
    values, gaps, extras, places, steps, more = (torch.cat(t) for t in zip(*parts, strict=True))
    return Tile(values, gaps, extras, places, _starts(steps), _starts(more), _arrived(weight), N, K)


def _pack_rows(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Some multiple of 128 rows, or the last -> values, gaps, extras, places, and steps and extras of each block."""
    device, integer = weight.device, BITS[weight.element_size()]
    ordered = _to_runs(weight)  # [runs, COLUMNS]
    across = -(-weight.shape[1] // COLUMNS)
    total = len(ordered) // ROWS
    run, at = (ordered.view(integer) != 0).nonzero(as_tuple=True)
    held = torch.bincount(run, minlength=len(ordered))
    first = (held.cumsum(0) - held)[run]
    last = first + held[run] - 1
    nth = torch.arange(run.numel(), device=device)
    up = torch.where(nth == first, at, at - at.roll(1))  # distance to a weight from the one below it, or from 0
    down = torch.where(nth == last, COLUMNS - 1 - at, at.roll(-1) - at)  # and from above
    slots_up, slots_down = ((far + FAR - 1).clamp(min=FAR) // FAR for far in (up, down))  # fillers included
    until = slots_up.cumsum(0)
    until = until - until[first] + slots_up[first]  # slots of the run up to and with a weight
    since = slots_down.flip(0).cumsum(0).flip(0)
    since = since - since[last] + slots_down[last]
    upward = until <= since
    distance, count, nth = (torch.where(upward, a, b) for a, b in ((up, down), (slots_up, slots_down), (until, since)))

    block, within = run // ROWS, run % ROWS
    pair = block // across // 2 * across + block % across
    needs = torch.bincount(pair * MOST + (nth + 7) // 8, minlength=-(-total // across // 2) * across * MOST).view(
        -1, MOST
    )
    left_over = needs.flip(1).cumsum(1).flip(1) - needs  # [pairs, MOST] weights that need more steps
    halves = torch.full((len(needs), 1), 2, device=device)
    if total // across % 2:  # the last 64 rows have no others below
        halves[-across:] = 1
    bytes = left_over * EXTRA_BYTES + torch.arange(MOST, device=device) * STEP_BYTES * halves
    steps = bytes.argmin(1).view(-1, across).repeat_interleave(2, 0).flatten()[:total]
    starts = steps.cumsum(0) - steps

    fits = nth <= 8 * steps[block]
    extras, places = ordered[run, at][~fits], (at * ROWS + within)[~fits].to(torch.int16)
    more = torch.bincount(block[~fits], minlength=total)
    extras, places = _in_fours(extras, 0, more), _in_fours(places, -1, more)

    run, at, block, within, upward, distance, count, nth = (
        t[fits] for t in (run, at, block, within, upward, distance, count, nth)
    )
    lane = torch.where(upward, 0, ROWS) + within % 2 * 32 + within // 2
    longest = torch.zeros(2 * len(ordered), dtype=torch.int64, device=device)
    side = 2 * run + upward
    longest.scatter_reduce_(0, side, nth, "amax")
    slot = 8 * steps[block] - longest[side] + nth - 1  # padding comes first
    values = torch.zeros(int(steps.sum()) * LANES * 8, dtype=weight.dtype, device=device)
    gaps = torch.zeros(int(steps.sum()) * LANES, dtype=torch.int32, device=device)
    values[((starts[block] + slot // 8) * LANES + lane) * 8 + slot % 8] = ordered[run, at]
    source = torch.repeat_interleave(count)  # of every slot, fillers included
    fillers = count[source] - 1
    n = torch.arange(source.numel(), device=device) - (count.cumsum(0) - count)[source]
    gap = torch.where(n < fillers, FAR, distance[source] - FAR * fillers)
    slot = slot[source] - fillers + n
    word = (starts[block[source]] + slot // 8) * LANES + lane[source]
    gaps.index_add_(0, word, (gap << (slot % 4 * 8 + slot % 8 // 4 * 4)).to(torch.int32))
    return values, gaps, extras, places, steps, more + -more % 4


def _in_fours(extras: torch.Tensor, filler: int, more: torch.Tensor) -> torch.Tensor:
    """The extras of all blocks, `more` [blocks] of each, the last four of a block filled up."""
    room = more + -more % 4
    filled = torch.full((int(room.sum()),), filler, dtype=extras.dtype, device=extras.device)
    shift = (room.cumsum(0) - room) - (more.cumsum(0) - more)
    filled[torch.arange(len(extras), device=extras.device) + shift.repeat_interleave(more)] = extras
    return filled


def unpack_ref(packed: Tile) -> torch.Tensor:
    N, K = packed.shape
    device = packed.values.device
    steps = packed.starts.diff().long()
    T = int(steps.sum())
    block = torch.repeat_interleave(steps)  # [T] block of a step
    slot = torch.arange(8, device=device)
    gap = (packed.gaps.view(T, LANES, 1) >> (slot % 4 * 8 + slot // 4 * 4)) & FAR  # [T, LANES, 8]
    walked = torch.nn.functional.pad(gap.sum(2).cumsum(0), (0, 0, 1, 0))  # [T + 1, LANES], all blocks in one walk
    at = gap.cumsum(2) + (walked[:-1] - walked[packed.starts[:-1].long()][block])[:, :, None]
    lane = torch.arange(LANES, device=device)[:, None]
    at = torch.where(lane < ROWS, at, COLUMNS - 1 - at)
    run = block[:, None, None] * ROWS + lane % 32 * 2 + lane % ROWS // 32
    values = packed.values.view(T, LANES, 8)
    holds = values.view(BITS[values.element_size()]) != 0
    ordered = torch.zeros(steps.numel() * ROWS, COLUMNS, dtype=values.dtype, device=device)
    ordered[run.expand_as(at)[holds], at[holds]] = values[holds]

    place = packed.places.long()
    block = torch.repeat_interleave(packed.extra_starts.diff().long())
    run, at, extra = (t[place >= 0] for t in (block * ROWS + place % ROWS, place // ROWS, packed.extras))
    ordered[run, at] = extra
    return _from_runs(ordered, N, K)


def _arrived(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(-(-weight.shape[0] // ROWS), dtype=torch.int32, device=weight.device)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _to_runs(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [blocks * ROWS, COLUMNS], runs by columns."""
    N, K = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -K % COLUMNS, 0, -N % ROWS))
    blocks = padded.view(-(-N // ROWS), ROWS, -(-K // COLUMNS), COLUMNS).transpose(1, 2)
    return _swizzled(blocks.reshape(-1, ROWS, COLUMNS)).view(-1, COLUMNS)


def _from_runs(ordered: torch.Tensor, N: int, K: int) -> torch.Tensor:
    down, across = -(-N // ROWS), -(-K // COLUMNS)
    blocks = _swizzled(ordered.view(-1, ROWS, COLUMNS)).view(down, across, ROWS, COLUMNS)
    return blocks.transpose(1, 2).reshape(down * ROWS, across * COLUMNS)[:N, :K].contiguous()


def _swizzled(blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, ROWS, COLUMNS] with row i ^ (k % 8 * 8) in row i of column k, which is its own inverse."""
    k = torch.arange(COLUMNS, device=blocks.device)
    row = torch.arange(ROWS, device=blocks.device)[:, None] ^ (k % 8 * 8)
    return blocks[:, row, k]
