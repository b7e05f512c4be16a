"""SparseGPT (arXiv:2301.00774): remove weights column by column and let those to the right make up for the error.

With H = sum of x x^T over the calibration tokens, removing weight w_j of a row costs w_j^2 / [H^-1]_jj, and the best change of the
others follows the Cholesky factor U of H^-1 (eqs. 3 and 4): w_right -= (w_j / U_jj) U_j,right. Columns go in blocks; the mask of a block
is chosen when the block is reached, from weights that already carry the earlier blocks' corrections. The damping of H starts at 1 % of
its mean diagonal and grows tenfold until the factorisation succeeds. Inputs that were never active are removed first.
"""

import torch

from dlpkit.calibration import Stats
from dlpkit.kernels.score import Scores
from dlpkit.kernels.select import keep
from dlpkit.kernels.sweep import GROUPS, sweep_
from dlpkit.patterns import Pattern

NEEDS = {"sq", "hessian"}
PER = "matrix"
BLOCK = 128  # columns per lazy update
DAMPING = (0.01, 0.1, 1.0)  # shares of the mean diagonal


def scores(weight: torch.Tensor, stats: Stats) -> Scores:
    """|w| / [H^-1]_jj ** (1/2), the root of what removing w costs before any repair"""
    return Scores(weight, scale=1 / stats.once(_upper_factor)[0].diag())


def solve(weight: torch.Tensor, stats: Stats, pattern: Pattern) -> torch.Tensor:
    """[N, K] -> [N, K] of the same dtype, zeros following `pattern` and what stays corrected for them. Raises ValueError for NaN or Inf."""
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or Inf: the checkpoint is damaged")
    U, dead = stats.once(_upper_factor)  # [K, K], [K]
    W = weight.float().masked_fill(dead, 0.0)
    width = pattern.block or (pattern.m if pattern.m not in (0, *GROUPS) else BLOCK)
    for start in range(0, W.shape[1], width):
        stop = min(start + width, W.shape[1])
        block, factor = W[:, start:stop], U[start:stop, start:stop]
        kept = None if pattern.m else keep(Scores(block, 1 / factor.diag()), pattern.cut(block.shape, PER))
        errors = sweep_(block, factor, kept, pattern.n, pattern.m)
        W[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1)
    return W.to(weight.dtype)


def _upper_factor(stats: Stats) -> tuple[torch.Tensor, torch.Tensor]:
    """-> upper U [K, K] with U^T U = H^-1, and [K] bool of the inputs that were never active.

    With the columns in reverse order H = L L^T, and the reverse of L^-1 is U: neither H^-1 nor a second factorisation is needed.
    """
    dead = stats.hessian.diag() == 0
    H = stats.hessian.flip(0, 1)
    H.diagonal()[dead.flip(0)] = 1.0
    mean, before = H.diag().mean(), 0.0
    for damping in DAMPING:
        H.diagonal().add_(mean, alpha=damping - before)
        before = damping
        L, failed = torch.linalg.cholesky_ex(H)
        if not failed.item():
            U = torch.linalg.solve_triangular(L, torch.eye(len(L), device=L.device), upper=False).flip(0, 1)
            if torch.isfinite(U).all():
                return U.contiguous(), dead
    raise ValueError(
        f"the Hessian of {len(H)} inputs cannot be factorised, damped by up to {DAMPING[-1]:g} x its mean diagonal"
    )
