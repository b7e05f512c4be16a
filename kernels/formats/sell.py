"""Sliced ELLPACK with 4-bit gaps: every thread walks its own piece of a row. For masks without structure.

A *slice* is `rows` rows; every row is cut into `segments` pieces of equal length, and each (segment, row) is one **lane**: a run of
slots in column order. A slot is a value and its distance from the slot before it, 0 to 15; a longer jump passes through filler
slots (distance 15, value 0). A lane starts at its own base column, so its first distance is 0, and padding (distance 0, value 0)
never leaves the row. Slots that hold no weight have all value bits zero; a stored weight never has, so -0.0 survives.

    lane    segment * rows + row: 32 neighbouring lanes are 32 rows at nearly the same column, and share the cache lines of x
    values  [slice][step][lane][8]; the last step of a slice, if not full, is [pair][lane][2]
    gaps    [slice][step][lane] int32, slot j of the step in bits 4 j to 4 j + 3
    bases   [slice][lane]
    rows    [slice][row], the output row; rows are sorted by length so that a slice pads little; N where there is none

20 bits per slot. Lengths are per slice in pairs of slots: `pairs[g]` pairs, and `steps[g]` steps, per lane lie before slice g.
Why not one layout with the 64-row, 256-column blocks of the batch kernel: there all 128 lanes of a block take as many steps; here a lane
spans a stretch of the row and rows of like length share a slice, which pads less.
"""

import math
from dataclasses import dataclass

import torch

from dlpkit.kernels import tiles
from dlpkit.kernels.formats._operator import ByOperator
from dlpkit.kernels.runtime import HAS_TRITON, use_triton
from dlpkit.kernels.storage import BITS, check_matrix

if HAS_TRITON:
    from dlpkit.kernels import ops  # noqa: F401 (registers torch.ops.dlpkit)
    from dlpkit.kernels import slots as kernels
    from dlpkit.kernels.arrange import arrange
    from dlpkit.kernels.early import settle

FAR = 15  # the largest distance between two slots
CHUNK = 2**22  # weights packed at a time
MARKS = 16  # columns up to which the nonzeros of a row are counted to order the rows
SPLITS = (8, 4, 3, 2, 2)  # groups made by each sine component


@dataclass(frozen=True)
class Sell(ByOperator):
    values: torch.Tensor  # [2 * R * S * pairs[-1]], dtype of the weight
    gaps: torch.Tensor  # [R * S * steps[-1]] int32
    bases: torch.Tensor  # [G * R * S] int16, or int32 for K > 2**15
    order: torch.Tensor  # [G * R] int32
    pairs: torch.Tensor  # [G + 1] int32
    steps: torch.Tensor  # [G + 1] int32
    N: int
    K: int
    rows: int  # R
    segments: int  # S

    def _fields(self) -> tuple:
        tensors = self.values, self.gaps, self.bases, self.order, self.pairs, self.steps
        return *tensors, self.N, self.K, self.rows, self.segments

    def _decoded(self) -> torch.Tensor:
        return unpack_ref(self)


def pack(weight: torch.Tensor, rows: int = 0, segments: int = 0, slack: float | None = None) -> Sell:
    """[N, K] of any float dtype -> Sell on the same device. `rows` and `segments` are powers of two; 0 asks `tiles`. Raises
    ValueError unless the weight has rows and columns.
    """
    check_matrix(weight, "sell")
    weight = weight.detach().contiguous()
    if not use_triton(weight):
        return pack_ref(weight, rows, segments, slack)
    N, K = weight.shape
    integers = weight.view(BITS[weight.element_size()])
    bits, last, length, marks = kernels.profile(integers, MARKS)
    first = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    slots = int(first[-1])
    rows, segments, slack = _grid(weight, slots, rows, segments, slack)
    needed = _pairs(length, segments, slack)
    order = arrange(needed, _components(marks), SPLITS)
    pairs = needed[order[::rows]]  # the first row of a slice is its longest
    before = {"pairs": _starts(pairs), "steps": _starts((pairs + 3) // 4)}
    chunk = _chunk(K, rows)
    tensors = kernels.fill(
        integers, bits, last, first, slots, order, **before, chunk=chunk, rows=rows, segments=segments
    )
    values, gaps, bases = tensors
    order = torch.nn.functional.pad(order, (0, -N % rows), value=N)
    settle(weight.device)
    return Sell(values.view(weight.dtype), gaps, bases, order, **before, N=N, K=K, rows=rows, segments=segments)


def pack_ref(weight: torch.Tensor, rows: int = 0, segments: int = 0, slack: float | None = None) -> Sell:
    N, K = weight.shape
    parts = weight.split(max(1, CHUNK // K))
    length, marks = (torch.cat(t) for t in zip(*(_profile(part) for part in parts), strict=True))
    rows, segments, slack = _grid(weight, int(length.sum()), rows, segments, slack)
    pairs = _pairs(length, segments, slack)
    order = arrange_ref(pairs, marks)
    parts = [_pack_chunk(weight[chunk], pairs[chunk], rows, segments) for chunk in order.split(_chunk(K, rows))]
    before = {name: _starts(torch.cat([part[name] for part in parts])) for name in ("pairs", "steps")}
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("values", "gaps", "bases")}
    order = torch.nn.functional.pad(order, (0, -N % rows), value=N).to(torch.int32)
    return Sell(**joined, order=order, **before, N=N, K=K, rows=rows, segments=segments)


def arrange_ref(pairs: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """[N] pairs that a lane of each row needs, [N, MARKS] -> the order in which rows make slices.

    Longest first, so that a slice pads little, and among equals by how the row's nonzeros spread over the columns, so that the rows
    of a slice reach the same columns at the same time and share lines of x. Nonzeros up to a column, less their even share, are a
    Brownian bridge: its sine components have variances 1, 1/4, 1/9, ..., and each splits the groups that the ones before have made.
    """
    group = torch.unique(-pairs, return_inverse=True)[1]
    order = torch.argsort(group, stable=True)
    for component, parts in zip(_components(marks).t(), SPLITS, strict=True):
        order = component.argsort(stable=True)
        order = order[group[order].argsort(stable=True)]
        size = torch.bincount(group)
        within = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[group[order]]
        group[order] = group[order] * parts + within * parts // size[group[order]]
    return order


def _components(marks: torch.Tensor) -> torch.Tensor:
    """[N, MARKS] -> [N, waves] float32, the sine components of each row's bridge."""
    share = [(i + 1) / MARKS for i in range(MARKS)]  # of the nonzeros, if they spread evenly
    waves = [[math.sin(math.pi * wave * at) for at in share] for wave in range(1, len(SPLITS) + 1)]
    for wave in waves:  # the last mark counts all nonzeros
        wave[-1] -= sum(a * b for a, b in zip(wave, share, strict=True))
    return marks.float() @ torch.tensor(waves, device=marks.device).t()


def _pack_chunk(weight: torch.Tensor, pairs: torch.Tensor, R: int, S: int) -> dict[str, torch.Tensor]:
    """Rows in order and the pairs that a lane of each needs -> values, gaps, bases, and pairs and steps of each slice."""
    N, K = weight.shape
    device, L, G = weight.device, R * S, -(-N // R)
    row, column, value, length = _slots(weight)  # [slots] each, and [N]
    pairs = torch.nn.functional.pad(pairs, (0, -N % R)).view(G, R).amax(1)
    steps = (pairs + 3) // 4
    pairs_before, steps_before = pairs.cumsum(0) - pairs, steps.cumsum(0) - steps

    begin = _cuts(row, column, length, 2 * pairs.repeat_interleave(R)[:N], K, S).flatten()  # [N * S]
    slot = torch.arange(row.numel(), device=device)
    run = torch.searchsorted(begin, slot, right=True) - 1  # row * S + segment
    at = slot - begin[run]  # slot within the lane
    lane = run % S * R + row % R
    block = row // R  # slice of each slot
    bases = torch.zeros(G * L, dtype=torch.int16 if K <= 2**15 else torch.int32, device=device)
    head = at == 0
    bases[(block * L + lane)[head]] = column[head].to(bases.dtype)
    gap = torch.where(head, 0, column - column.roll(1))  # [slots]

    values = torch.zeros(2 * L * int(pairs.sum()), dtype=weight.dtype, device=device)
    values[_value_index(pairs_before[block], pairs[block], at // 8, at % 8, lane, L)] = value
    gaps = torch.zeros(L * int(steps.sum()), dtype=torch.int32, device=device)
    gaps.index_add_(0, (steps_before[block] + at // 8) * L + lane, (gap << 4 * (at % 8)).to(torch.int32))
    return {"values": values, "gaps": gaps, "bases": bases, "pairs": pairs, "steps": steps}


def unpack_ref(packed: Sell) -> torch.Tensor:
    R, L = packed.rows, packed.rows * packed.segments
    device = packed.values.device
    pairs, steps = packed.pairs.long(), packed.steps.long()
    block = torch.repeat_interleave(torch.arange(steps.numel() - 1, device=device), steps.diff())  # [T] slice of a step
    slot = torch.arange(8, device=device)
    lane = torch.arange(L, device=device)

    gap = (packed.gaps.view(-1, 1, L) >> 4 * slot[:, None]) & FAR  # [T, 8, L]
    walked = torch.nn.functional.pad(gap.flatten(0, 1).cumsum(0), (0, 0, 1, 0))  # [8 T + 1, L], all slices in one walk
    start = packed.bases.view(-1, L).long() - walked[8 * steps[:-1]]  # [G, L]
    column = walked[1:].view(-1, 8, L) + start[block][:, None]  # [T, 8, L]
    row = packed.order.view(-1, 1, R).long()[block].expand(-1, 8, -1).repeat(1, 1, packed.segments)  # [T, 8, L]

    step = torch.arange(block.numel(), device=device) - steps[block]
    full = pairs.diff()[block]
    index = _value_index(*(t[:, None, None] for t in (pairs[block], full, step)), slot[:, None], lane, L)  # [T, 8, L]
    there = (4 * step[:, None] + slot // 2 < full[:, None])[:, :, None]  # slots past the last pair are not stored
    values = packed.values if packed.values.numel() else packed.values.new_zeros(1)
    value = values[torch.where(there, index, 0)]
    holds = there & (value.view(BITS[value.element_size()]) != 0)  # not filler, not padding
    out = torch.zeros(packed.shape, dtype=value.dtype, device=device)
    out[row[holds], column[holds]] = value[holds]
    return out


def _nonzeros(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mask [N, K]; row, column, gap from the nonzero before in the row, and fillers that the gap takes, [nnz] each."""
    keep = weight.view(BITS[weight.element_size()]) != 0
    row, column = keep.nonzero(as_tuple=True)
    follows = torch.nn.functional.pad(row[1:] == row[:-1], (min(1, row.numel()), 0))  # not the first of its row
    gap = torch.where(follows, column - column.roll(1), 0)
    return keep, row, column, gap, (gap - 1).clamp(min=0) // FAR


def _profile(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of each row [N], and its nonzeros in the first 1 / MARKS, 2 / MARKS, ... of the columns [N, MARKS]."""
    N, K = weight.shape
    _, row, column, _, fillers = _nonzeros(weight)
    length = torch.zeros(N, dtype=torch.int64, device=row.device).index_add_(0, row, fillers + 1)
    return length, torch.bincount(row * MARKS + column * MARKS // K, minlength=N * MARKS).view(N, MARKS).cumsum(1)


def _grid(weight: torch.Tensor, slots: int, rows: int, segments: int, slack: float | None) -> tuple[int, int, float]:
    N, K = weight.shape
    if not rows or not segments:
        rows, segments = tiles.lanes(N, K, slots / weight.numel())
    return rows, segments, tiles.slack(K) if slack is None else slack


def _chunk(K: int, rows: int) -> int:
    """Rows, in order, that are packed at a time and share the columns at which their lanes want to begin."""
    return -(-max(1, CHUNK // K) // rows) * rows


def _pairs(length: torch.Tensor, S: int, slack: float) -> torch.Tensor:
    """[N] slots of a row -> [N] pairs of slots that each of its S lanes needs."""
    return torch.ceil(torch.ceil(length / S) * (0.5 + slack / 2)).long()


def _slots(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Row, column and value of every slot, row by row, and the number of slots in each row."""
    keep, row, column, gap, fillers = _nonzeros(weight)
    source = torch.repeat_interleave(fillers + 1)  # [slots], index into nnz
    nth = torch.arange(source.numel(), device=row.device) - ((fillers + 1).cumsum(0) - fillers - 1)[source]
    stop = column[source]
    value = torch.where(nth == fillers[source], weight[keep][source], 0)
    length = torch.zeros(weight.shape[0], dtype=torch.int64, device=row.device).index_add_(0, row, fillers + 1)
    return row[source], torch.minimum(stop, stop - gap[source] + FAR * (nth + 1)), value, length


def _cuts(row, column, length, room, K: int, S: int) -> torch.Tensor:
    """[N, S] the slot at which each lane begins: at columns that share the slots of all rows evenly, as far as `room` allows."""
    N = length.numel()
    first = length.cumsum(0) - length
    up_to = torch.bincount(column, minlength=K).cumsum(0)  # [K] slots of all rows up to a column, the column included
    segment = (up_to - 1).clamp(min=0) * S // max(1, row.numel())
    held = torch.bincount(row * S + segment[column], minlength=N * S).view(N, S)
    wanted = first[:, None] + held.cumsum(1) - held
    begin = wanted.clone()
    for s in range(1, S):
        at_least = torch.maximum(begin[:, s - 1], first + length - (S - s) * room)
        begin[:, s] = wanted[:, s].clamp(at_least, torch.minimum(begin[:, s - 1] + room, first + length))
    return begin


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _value_index(before, pairs, step, slot, lane, L):
    """Where a slot's value lies: `before` pairs per lane precede its slice, whose lanes have `pairs` pairs each."""
    in_full = lane * 8 + slot
    in_last = slot // 2 * (2 * L) + lane * 2 + slot % 2
    return (before + 4 * step) * (2 * L) + torch.where(4 * step + 4 <= pairs, in_full, in_last)
