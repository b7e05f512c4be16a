"""The smallest scores go: of every row, of the whole matrix, of every block of columns of a row, or all but n of every m.

Ties go by index: of equal scores the one further left goes first, as a stable ascending sort has it. `select` is that sort, the
reference; `keep` and `zero_` give the same from the weight and its terms, where a GPU is by the fused kernels in cull.py.
"""

from dataclasses import dataclass

import torch

from dlpkit.kernels.runtime import HAS_TRITON
from dlpkit.kernels.score import Scores

if HAS_TRITON:
    from dlpkit.kernels import cull


@dataclass(frozen=True)
class Cut:
    """How many go from where: the `go` smallest scores of every `size` columns of a row, the `last` smallest of a shorter rest of it."""

    size: int  # 0: the whole matrix is one group
    go: int
    last: int = 0


def share(shape: tuple[int, int], sparsity: float, per: str = "row", block: int = 0) -> Cut:
    """round(sparsity * size) of every group of an [N, K] weight: per="row", per="matrix", or every `block` columns of a row.

    Raises ValueError for another `per`.
    """
    N, K = shape
    if block:
        size = min(block, K)
        return Cut(size, round(sparsity * size), round(sparsity * (K % size if size else 0)))
    if per == "row":
        return Cut(K, round(sparsity * K))
    if per == "matrix":
        return Cut(0, round(sparsity * N * K))
    raise ValueError(f"share compares per 'row' or per 'matrix', got {per!r}")


def all_but(shape: tuple[int, int], n: int, m: int) -> Cut:
    """All but n of every m consecutive columns. Raises ValueError when K is not a multiple of m."""
    if shape[1] % m:
        raise ValueError(f"all_but wants K to be a multiple of {m}, got K = {shape[1]}")
    return Cut(m, m - n)


def select(score: torch.Tensor, cut: Cut) -> torch.Tensor:
    """[N, K] scores -> [N, K] bool, True where kept. The reference: a stable sort of every group."""
    if not cut.size:
        return _keep(score.reshape(1, -1), cut.go).view(score.shape)
    whole = score.shape[1] // cut.size * cut.size
    kept = _keep(score[:, :whole].reshape(-1, cut.size), cut.go).view(score.shape[0], whole)
    return torch.cat([kept, _keep(score[:, whole:], cut.last)], dim=1)


def keep(scores: Scores, cut: Cut) -> torch.Tensor:
    """-> [N, K] bool, True where kept. Raises ValueError for NaN or Inf among the scores."""
    return _apply(scores, torch.empty(scores.weight.shape, dtype=torch.bool, device=scores.weight.device), cut)


def zero_(scores: Scores, cut: Cut) -> torch.Tensor:
    """The weight, +0.0 in place where its scores are among the smallest. Raises ValueError for NaN or Inf among the scores."""
    return _apply(scores, scores.weight, cut)


def _apply(scores: Scores, out: torch.Tensor, cut: Cut) -> torch.Tensor:
    if not out.numel():
        return out
    if scores.on_kernels():
        bad = cull.groups(scores, out, cut.size, cut.go, cut.last) if cut.size else cull.matrix(scores, out, cut.go)
    else:
        dense = scores.dense()
        bad = ~torch.isfinite(dense).all()
        kept = select(dense, cut)
        out.copy_(kept) if out.dtype == torch.bool else out.masked_fill_(~kept, 0.0)
    if bad.item():
        raise ValueError("the scores hold NaN or Inf: the weight, or the inputs it was measured with, are damaged")
    return out


def _keep(score: torch.Tensor, drop: int) -> torch.Tensor:
    """[R, C] -> [R, C] bool, False at the `drop` smallest of every row."""
    order = score.argsort(dim=1, stable=True)[:, :drop]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)
