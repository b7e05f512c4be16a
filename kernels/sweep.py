"""One pass over a block of columns from left to right: what is removed from a column is made up for by those to the right of it.

The optimal brain surgeon's update with U the upper Cholesky factor of H^-1 (SparseGPT, arXiv:2301.00774, eqs. 3 and 4): for each
column j, e = w_j / U_jj where w_j goes and 0 where it stays, then w_k -= e U_jk for k >= j. Rows do not know of each other, so a program
holds some rows of the whole block in registers: one launch instead of four for every column.
"""

import torch

from dlpkit.kernels.runtime import HAS_TRITON, use_triton
from dlpkit.kernels.score import Scores
from dlpkit.kernels.select import all_but, keep

if HAS_TRITON:
    from dlpkit.kernels import columns

GROUPS = (2, 4, 8, 16, 32)  # m of the N:M patterns that the kernel chooses itself


def sweep_(
    block: torch.Tensor, factor: torch.Tensor, kept: torch.Tensor | None = None, n: int = 0, m: int = 0
) -> torch.Tensor:
    """block [N, C] float32, made sparse and corrected in place; factor U [C, C] float32 -> errors e [N, C], for the columns behind it.

    kept: [N, C] bool, or None: then every m columns keep n, the largest |w_j| / U_jj at the moment they are reached.
    Raises ValueError for both or neither, and for a C that is not a multiple of m.
    """
    if (kept is None) == (m == 0) or (m and block.shape[1] % m):
        raise ValueError(
            f"sweep_ wants a mask or n of every m in a multiple of m columns, got {n}:{m} in {block.shape[1]} columns"
        )
    if use_triton(block, factor) and (m == 0 or m in GROUPS):
        return columns.sweep_(block, factor, kept, n, m)
    return sweep_ref_(block, factor, kept, n, m)


def sweep_ref_(
    block: torch.Tensor, factor: torch.Tensor, kept: torch.Tensor | None = None, n: int = 0, m: int = 0
) -> torch.Tensor:
    errors = torch.empty_like(block)
    diagonal = factor.diag()
    kept = torch.empty_like(block, dtype=torch.bool) if m else kept
    for j in range(block.shape[1]):
        if m and j % m == 0:
            group = Scores(block[:, j : j + m], 1 / diagonal[j : j + m])
            kept[:, j : j + m] = keep(group, all_but(group.weight.shape, n, m))
        errors[:, j] = block[:, j].masked_fill(kept[:, j], 0.0) / diagonal[j]
        block[:, j:].addr_(errors[:, j], factor[j, j:], alpha=-1)
    block.masked_fill_(~kept, 0.0)
    return errors
