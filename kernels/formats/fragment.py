"""2:4 sparsity as Hopper's sparse tensor cores take it: the registers of wgmma.mma_async.sp, thread by thread, see mma.py.

A group of four columns holds two values and their positions, the smaller first; one with fewer nonzeros also holds zeros at its first
free positions. A step is 64 rows by 64 columns and 128 threads. Thread 4 g + q of warp w holds, for both halves s of the columns, eight
values: of rows 16 w + g and 16 w + g + 8 the groups q and q + 4, four registers of two values:

    values  [N / 64][K / 64][s][w][g][q][group q or q + 4][row g or g + 8][2]
    codes   [N / 64][K / 64][w][g][s][c] int32: positions of groups 4 c to 4 c + 3 of half s, four bits each, of row g and then g + 8

9 bits per weight; N and K are padded to multiples of 64. Source: PTX ISA, wgmma.mma_async.sp.
"""

from dataclasses import dataclass

import torch

from dlpkit.kernels.formats._operator import ByOperator
from dlpkit.kernels.runtime import HAS_TRITON, use_triton
from dlpkit.kernels.storage import BITS, check_matrix, check_two_of_four

if HAS_TRITON:
    from dlpkit.kernels import fragments, ops  # noqa: F401 (ops registers torch.ops.dlpkit)
    from dlpkit.kernels.early import settle

SIDE = 64  # rows and columns of a step


@dataclass(frozen=True)
class Fragment(ByOperator):
    values: torch.Tensor  # [ceil(N / 64) * ceil(K / 64) * 2048], dtype of the weight
    codes: torch.Tensor  # [ceil(N / 64) * ceil(K / 64) * 128] int32
    N: int
    K: int

    def _fields(self) -> tuple:
        return self.values, self.codes, self.N, self.K

    def _decoded(self) -> torch.Tensor:
        return unpack_ref(self)


def pack(weight: torch.Tensor) -> Fragment:
    """[N, K] of any float dtype -> Fragment on the same device. Raises ValueError unless the weight is 2:4 sparse."""
    check_matrix(weight, "fragment")
    weight = weight.detach().contiguous()
    check_two_of_four(weight, "fragment")
    if not use_triton(weight):
        return pack_ref(weight)
    values, codes = fragments.pack(weight.view(BITS[weight.element_size()]))
    settle(weight.device)
    return Fragment(values.view(weight.dtype), codes, *weight.shape)


def pack_ref(weight: torch.Tensor) -> Fragment:
    N, K = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -K % SIDE, 0, -N % SIDE)).unflatten(1, (-1, 4))  # [rows, groups, 4]
    keep = (groups.view(BITS[weight.element_size()]) != 0).to(torch.uint8)
    position = keep.sort(dim=2, descending=True, stable=True).indices[:, :, :2].sort(2).values
    values = _by_thread(groups.gather(2, position)).permute(0, 4, 5, 1, 3, 7, 6, 2, 8)
    code = _by_thread(position[:, :, 0] | position[:, :, 1] << 2).permute(0, 4, 1, 3, 5, 6, 2, 7)  # ..., row of two, q
    codes = (code << _shifts(code)).sum((-2, -1))
    return Fragment(values.flatten(), codes.to(torch.int32).flatten(), N, K)


def unpack_ref(packed: Fragment) -> torch.Tensor:
    atoms, T = -(-packed.N // SIDE), -(-packed.K // SIDE)
    values = packed.values.view(atoms, T, 2, 4, 8, 4, 2, 2, 2).permute(0, 3, 7, 4, 1, 2, 6, 5, 8)  # _by_thread's order
    code = packed.codes.view(atoms, T, 4, 8, 2, 2, 1, 1)
    code = (code >> _shifts(code)) & 15
    code = code.permute(0, 2, 6, 3, 1, 4, 5, 7).reshape(atoms * SIDE, T * SIDE // 4)
    position = torch.stack([code & 3, code >> 2], 2).long()
    values = values.reshape(*position.shape)
    dense = values.new_zeros(atoms * SIDE, T * SIDE // 4, 4).scatter_(2, position, values)
    return dense.flatten(1)[: packed.N, : packed.K].contiguous()


def _by_thread(groups: torch.Tensor) -> torch.Tensor:
    """[rows, groups, ...] -> [N / 64, w, row of two, g, K / 64, s, group of two, q, ...]."""
    return groups.unflatten(1, (-1, 2, 2, 4)).unflatten(0, (-1, 4, 2, 8))


def _shifts(code: torch.Tensor) -> torch.Tensor:
    """[row of two, q] bits before a code in its word."""
    return 16 * torch.arange(2, device=code.device)[:, None] + 4 * torch.arange(4, device=code.device)
