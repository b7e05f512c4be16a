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
Why not one layout with the 64-row, 256-column blocks of the batch kernel: those need a length per (row, block), which wastes 15 %
at 50 % sparsity and 23 % at 70 % on masks that are not balanced per block, where this one wastes below 2 %.
"""

from dataclasses import dataclass

import torch

from dlpkit.kernels import tiles
from dlpkit.kernels.runtime import HAS_TRITON, use_triton
from dlpkit.kernels.storage import BITS

if HAS_TRITON:
    from dlpkit.kernels import ops  # noqa: F401 (registers torch.ops.dlpkit)

FAR = 15  # the largest distance between two slots


@dataclass(frozen=True)
class Sell:
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

    @property
    def shape(self) -> tuple[int, int]:
        return self.N, self.K

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.gaps, self.bases, self.order, self.pairs, self.steps))

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype != self.values.dtype or x.shape[-1:] != (self.K,):
            want = f"x [..., {self.K}] of {self.values.dtype}"
            raise ValueError(f"sell.matmul wants {want}, got {tuple(x.shape)} of {x.dtype}")
        if not self._kernels():
            return torch.nn.functional.linear(x, unpack_ref(self), bias)
        y = torch.ops.dlpkit.sell_matmul(x.reshape(-1, self.K), bias, *self._fields())
        return y.view(*x.shape[:-1], self.N)

    def dense(self) -> torch.Tensor:
        return torch.ops.dlpkit.sell_dense(*self._fields()) if self._kernels() else unpack_ref(self)

    def _kernels(self) -> bool:
        return use_triton(self.values) and self.values.element_size() == 2

    def _fields(self) -> tuple:
        tensors = self.values, self.gaps, self.bases, self.order, self.pairs, self.steps
        return *tensors, self.N, self.K, self.rows, self.segments


def pack(weight: torch.Tensor, rows: int = 0, segments: int = 0, slack: float | None = None) -> Sell:
    """[N, K] of any float dtype -> Sell on the same device. `rows` and `segments` are powers of two; 0 asks `tiles`."""
    if weight.ndim != 2:
        raise ValueError(f"sell.pack wants a weight [N, K], got shape {tuple(weight.shape)}")
    return pack_ref(
        weight.detach().contiguous(), rows, segments, tiles.slack(weight.shape[1]) if slack is None else slack
    )


def pack_ref(weight: torch.Tensor, rows: int, segments: int, slack: float) -> Sell:
    N, K = weight.shape
    device = weight.device
    keep = weight.view(BITS[weight.element_size()]) != 0  # [N, K]
    if not rows or not segments:
        rows, segments = tiles.lanes(N, K, float(keep.float().mean()) if keep.numel() else 0.0)
    R, S, L = rows, segments, rows * segments

    row, column, value, length = _slots(weight, keep)  # [slots] each, and [N]
    longest, order = length.sort(descending=True, stable=True)
    G = -(-N // R)
    place = torch.empty_like(order)
    place[order] = torch.arange(N, device=device)
    order = torch.nn.functional.pad(order, (0, G * R - N), value=N)
    lane_pairs = torch.ceil(torch.ceil(longest[::R] / S) * (0.5 + slack / 2)).long()  # [G]
    pairs, steps = _starts(lane_pairs), _starts((lane_pairs + 3) // 4)

    begin = _cuts(row, column, length, 2 * lane_pairs[place // R], K, S)  # [N, S]
    slot = torch.arange(row.numel(), device=device)
    run = torch.searchsorted(begin.flatten(), slot, right=True) - 1  # row * S + segment
    at = slot - begin.flatten()[run]  # slot within the lane
    lane = run % S * R + place[row] % R
    block = place[row] // R  # slice of each slot
    bases = torch.zeros(G * L, dtype=torch.int16 if K <= 2**15 else torch.int32, device=device)
    head = at == 0
    bases[(block * L + lane)[head]] = column[head].to(bases.dtype)
    gap = torch.where(head, 0, column - column.roll(1))  # [slots]

    step = at // 8
    values = torch.zeros(2 * L * int(pairs[-1]), dtype=weight.dtype, device=device)
    values[_value_index(pairs[block].long(), lane_pairs[block], step, at % 8, lane, L)] = value
    gaps = torch.zeros(L * int(steps[-1]), dtype=torch.int32, device=device)
    gaps.index_add_(0, (steps[block] + step) * L + lane, (gap << 4 * (at % 8)).to(torch.int32))
    return Sell(values, gaps, bases, order.to(torch.int32), pairs, steps, N, K, R, S)


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
    value = packed.values[torch.where(there, index, 0)] if packed.values.numel() else packed.values
    holds = there & (value.view(BITS[value.element_size()]) != 0)  # not filler, not padding
    out = torch.zeros(packed.shape, dtype=value.dtype, device=device)
    out[row[holds], column[holds]] = value[holds]
    return out


def _slots(weight: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Row, column and value of every slot, row by row, and the number of slots in each row."""
    row, column = keep.nonzero(as_tuple=True)  # [nnz]
    follows = torch.nn.functional.pad(row[1:] == row[:-1], (min(1, row.numel()), 0))  # not the first of its row
    gap = torch.where(follows, column - column.roll(1), 0)
    fillers = (gap - 1).clamp(min=0) // FAR
    source = torch.repeat_interleave(fillers + 1)  # [slots], index into nnz
    nth = torch.arange(source.numel(), device=row.device) - ((fillers + 1).cumsum(0) - fillers - 1)[source]
    stop = column[source]
    value = torch.where(nth == fillers[source], weight[keep][source], 0)
    length = torch.zeros(weight.shape[0], dtype=torch.int64, device=row.device).index_add_(0, row, fillers + 1)
    return row[source], torch.minimum(stop, stop - gap[source] + FAR * (nth + 1)), value, length


def _cuts(row, column, length, room, K: int, S: int) -> torch.Tensor:
    """[N, S] the slot at which each lane begins: near the column border it would have if rows were even, as far as `room` allows."""
    N = length.numel()
    first = length.cumsum(0) - length
    held = torch.bincount(row * S + column * S // K, minlength=N * S).view(N, S)  # slots between two borders
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
