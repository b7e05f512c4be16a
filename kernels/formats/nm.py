"""N:M sparsity: n values and their positions for every group of m columns. For masks that keep at most n in each group.

Lanes as in sell: a slice is `rows` rows, every row is cut into `segments` equal runs, lane = segment * rows + row. The row's values,
n for each group, are one sequence; value i stands in group i // n, at the position that its code gives, so runs need no base and no
length. A group with fewer than n nonzeros also stores zeros at free positions.

    values  [slice][step][part][lane][C]: V values in a step, in parts of C = min(V, 8)
    codes   [slice][step][lane] int32 = V codes of 32 / V bits: 2 bits for m = 4, 4 bits for m = 8 and 16, 8 bits for m = 32

Bits per weight: 9 for 2:4, 4.5 for 1:4, 10 for 4:8 and 8:16.
"""

from dataclasses import dataclass, replace

import torch

from dlpkit.kernels import tiles
from dlpkit.kernels.formats._operator import ByOperator
from dlpkit.kernels.runtime import HAS_TRITON, use_triton
from dlpkit.kernels.storage import BITS, check_matrix

if HAS_TRITON:
    from dlpkit.kernels import group, ops  # noqa: F401 (ops registers torch.ops.dlpkit)
    from dlpkit.kernels.early import settle

CODE_BITS = {4: 2, 8: 4, 16: 4, 32: 8}  # m -> bits of one position


@dataclass(frozen=True)
class NM(ByOperator):
    values: torch.Tensor  # [G * T * R * S * V], dtype of the weight
    codes: torch.Tensor  # [G * T * R * S] int32
    N: int
    K: int
    n: int
    m: int
    rows: int  # R
    segments: int  # S

    @property
    def step(self) -> int:
        """V, the values that one lane reads in one step."""
        return 32 // CODE_BITS[self.m]

    @property
    def steps(self) -> int:
        """T, the steps of every lane."""
        return -(-(-(-self.K // self.m) * self.n) // (self.segments * self.step))

    def _fields(self) -> tuple:
        grid = self.N, self.K, self.rows, self.segments
        return self.values, self.codes, *grid, self.n, self.m, self.step, self.steps

    def _decoded(self) -> torch.Tensor:
        return unpack_ref(self)


def pack(weight: torch.Tensor, rows: int = 0, segments: int = 0) -> NM:
    """[N, K] -> NM with the (n, m) that takes the fewest bits. Raises ValueError if none takes fewer than the dense weight."""
    check_matrix(weight, "nm")
    weight = weight.detach().contiguous()
    if not use_triton(weight):
        return pack_ref(weight, *infer_ref(weight), rows, segments)
    integers = weight.view(BITS[weight.element_size()])
    words, fullest = group.count(integers)
    n, m = _cheapest(weight, fullest.tolist())
    packed = _sized(weight, n, m, rows, segments)
    values, codes = group.pack(integers, words, n, m, packed.rows, packed.segments, packed.step, packed.steps)
    settle(weight.device)
    return replace(packed, values=values.view(weight.dtype), codes=codes)


def infer(weight: torch.Tensor) -> tuple[int, int]:
    """(n, m): at most n of every m neighbours in a row are not zero, in the fewest bits; ties go to the smaller m."""
    weight = weight.detach().contiguous()
    if not use_triton(weight):
        return infer_ref(weight)
    return _cheapest(weight, group.count(weight.view(BITS[weight.element_size()]))[1].tolist())


def infer_ref(weight: torch.Tensor) -> tuple[int, int]:
    return _cheapest(weight, [int(_groups(weight, m).sum(2).max()) for m in CODE_BITS])


def _cheapest(weight: torch.Tensor, most: list[int]) -> tuple[int, int]:
    """(n, m), from the most weights held in a group of each size."""
    bits = 8 * weight.element_size()
    fullest = {m: max(1, n) for m, n in zip(CODE_BITS, most, strict=True)}
    m = min(CODE_BITS, key=lambda m: -(-weight.shape[1] // m) * fullest[m] * (bits + CODE_BITS[m]))
    if fullest[m] * (bits + CODE_BITS[m]) >= bits * m:
        found = ", ".join(f"{n}:{m}" for m, n in fullest.items())
        raise ValueError(f"nm.pack wants a weight that is N:M sparse, this one is no sparser than {found}")
    return fullest[m], m


def pack_ref(weight: torch.Tensor, n: int, m: int, rows: int = 0, segments: int = 0) -> NM:
    packed = _sized(weight, n, m, rows, segments)
    keep = _groups(weight, m)  # [N, K / m, m]
    position = keep.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[:, :, :n].sort(2).values
    padded = torch.nn.functional.pad(weight, (0, -packed.K % m)).view(keep.shape)
    values, codes = (_to_lanes(t.flatten(1), packed) for t in (padded.gather(2, position), position))  # [G, T, L, V]
    place = CODE_BITS[m] * torch.arange(packed.step, device=weight.device)
    codes = (codes << place).sum(3).to(torch.int32)
    parts = values.unflatten(3, (-1, min(packed.step, 8))).transpose(2, 3)  # [G, T, V / C, L, C]
    return replace(packed, values=parts.flatten(), codes=codes.flatten())


def _sized(weight: torch.Tensor, n: int, m: int, rows: int, segments: int) -> NM:
    """An NM that knows its sizes but has the weight in place of values and codes."""
    N, K = weight.shape
    if not rows or not segments:
        rows, segments = tiles.nm_lanes(N, K, n, m, 32 // CODE_BITS[m])
    return NM(weight, weight, N, K, n, m, rows, segments)


def unpack_ref(packed: NM) -> torch.Tensor:
    N, K, n, m = packed.N, packed.K, packed.n, packed.m
    T, L, V = packed.steps, packed.rows * packed.segments, packed.step
    place = CODE_BITS[m] * torch.arange(V, device=packed.codes.device)
    codes = (packed.codes.view(-1, T, L, 1) >> place) & (2 ** CODE_BITS[m] - 1)  # [G, T, L, V]
    values = packed.values.view(-1, T, max(1, V // 8), L, min(V, 8)).transpose(2, 3).flatten(3)  # [G, T, L, V]
    groups = -(-K // m)
    values, position = (_to_rows(t, packed)[:N, : groups * n].view(N, groups, n) for t in (values, codes.long()))
    return values.new_zeros(N, groups, m).scatter_(2, position, values).view(N, groups * m)[:, :K].contiguous()


def _groups(weight: torch.Tensor, m: int) -> torch.Tensor:
    """[N, K] -> [N, ceil(K / m), m] bool, whether a weight has any bit set."""
    keep = weight.detach().contiguous().view(BITS[weight.element_size()]) != 0
    return torch.nn.functional.pad(keep, (0, -weight.shape[1] % m)).view(weight.shape[0], -1, m)


def _to_lanes(sequence: torch.Tensor, packed: NM) -> torch.Tensor:
    """[N, values of a row] -> [G, T, L, V]."""
    R, S, T, V = packed.rows, packed.segments, packed.steps, packed.step
    padding = (0, S * T * V - sequence.shape[1], 0, -packed.N % R)
    return torch.nn.functional.pad(sequence, padding).view(-1, R, S, T, V).permute(0, 3, 2, 1, 4).flatten(2, 3)


def _to_rows(lanes: torch.Tensor, packed: NM) -> torch.Tensor:
    """[G, T, L, V] -> [G * R, S * T * V], the inverse of `_to_lanes`."""
    R, S = packed.rows, packed.segments
    return lanes.unflatten(2, (S, R)).permute(0, 3, 2, 1, 4).flatten(2).flatten(0, 1)
