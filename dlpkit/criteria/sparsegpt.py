"""SparseGPT (arXiv:2301.00774): remove weights column by column and let those to the right make up for the error.

With H = sum of x x^T over the calibration tokens, removing weight w_j of a row costs w_j^2 / [H^-1]_jj, and the best change of the
others follows the Cholesky factor U of H^-1 (eqs. 3 and 4): w_right -= (w_j / U_jj) U_j,right. Columns go in blocks; the mask of a block
is chosen when the block is reached, from weights that already carry the earlier blocks' corrections. The damping of H starts at 1 % of
its mean diagonal and grows tenfold until the factorisation succeeds. Inputs that were never active are removed first.
"""

import torch

from dlpkit.calibration import Stats
from dlpkit.kernels.score import Scores
from dlpkit.kernels.select import keep as kept
from dlpkit.patterns import Pattern

NEEDS = {"sq", "hessian"}
PER = "matrix"
BLOCK = 128  # columns per lazy update
DAMPING = (0.01, 0.1, 1.0)  # shares of the mean diagonal


def scores(weight: torch.Tensor, stats: Stats) -> Scores:
    """|w| / [H^-1]_jj ** (1/2), the root of what removing w costs before any repair"""
    return Scores(weight, scale=1 / _upper_factor(stats.hessian)[0].diag())


def solve(weight: torch.Tensor, stats: Stats, pattern: Pattern) -> torch.Tensor:
    """[N, K] -> [N, K] of the same dtype, zeros following `pattern` and what stays corrected for them. Raises ValueError for NaN or Inf."""
    U, dead = _upper_factor(stats.hessian)  # [K, K], [K]
    W = weight.float().masked_fill(dead, 0.0)
    pruned = torch.zeros_like(W)
    width = pattern.block or BLOCK // max(pattern.m, 1) * max(pattern.m, 1) or pattern.m
    for start in range(0, W.shape[1], width):
        stop = min(start + width, W.shape[1])
        block, factor = W[:, start:stop], U[start:stop, start:stop]
        errors = torch.empty_like(block)
        keep = torch.empty_like(block, dtype=torch.bool)
        step = pattern.m or stop - start  # an N:M mask is chosen when its group is reached, others at the block's start
        for j in range(stop - start):
            if j % step == 0:
                keep[:, j : j + step] = _choose(block[:, j : j + step], factor.diag()[j : j + step], pattern)
            errors[:, j] = block[:, j].masked_fill(keep[:, j], 0.0) / factor[j, j]
            block[:, j:].addr_(errors[:, j], factor[j, j:], alpha=-1)
        pruned[:, start:stop] = block.masked_fill(~keep, 0.0)
        W[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1)
    return pruned.to(weight.dtype)


def _choose(weights: torch.Tensor, diagonal: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """[N, C] -> [N, C] bool keep mask of a few columns."""
    return kept(Scores(weights, 1 / diagonal), pattern.cut(weights.shape, PER))


def _upper_factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, K] -> upper U with U^T U = H^-1, and [K] bool of the inputs that were never active."""
    H = hessian.clone()
    dead = H.diag() == 0
    H.diagonal()[dead] = 1.0
    mean = H.diag().mean()
    for damping in DAMPING:
        damped = H + torch.diag(torch.full_like(H.diag(), damping * mean.item()))
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed.item() and torch.isfinite(U).all():
                return U, dead
    raise ValueError(
        f"the Hessian of {H.shape[0]} inputs cannot be factorised, damped by up to {DAMPING[-1]:g} x its mean diagonal"
    )
