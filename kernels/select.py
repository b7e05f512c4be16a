"""Scores -> keep mask: the k smallest go, per row, per matrix or per column block, or all but n of every m.

Ties go by index: of equal scores the one further left is removed first, as a stable ascending sort does.
"""

import torch


def select(score: torch.Tensor, sparsity: float, per: str = "row", block: int = 0) -> torch.Tensor:
    """[N, K] scores -> [N, K] bool, True where kept.

    per="row" removes round(sparsity * K) in every row; per="matrix" that share of the whole matrix; with `block`, that share of
    every row's every `block` columns (the last, shorter one in proportion). Raises ValueError for another `per`.
    """
    N, K = score.shape
    if block:
        return torch.cat([_keep(part, _share(sparsity, part.shape[1])) for part in score.split(block, dim=1)], dim=1)
    if per == "row":
        return _keep(score, _share(sparsity, K))
    if per == "matrix":
        return _keep(score.reshape(1, -1), _share(sparsity, N * K)).view(N, K)
    raise ValueError(f"select compares per 'row' or per 'matrix', got {per!r}")


def select_nm(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """[N, K] scores -> [N, K] bool: the n largest of every m consecutive columns are kept."""
    N, K = score.shape
    if K % m:
        raise ValueError(f"select_nm wants K to be a multiple of {m}, got K = {K}")
    return _keep(score.reshape(-1, m), m - n).view(N, K)


def _share(sparsity: float, count: int) -> int:
    return round(sparsity * count)


def _keep(score: torch.Tensor, drop: int) -> torch.Tensor:
    """[R, C] -> [R, C] bool, False at the `drop` smallest of every row."""
    order = score.argsort(dim=1, stable=True)[:, :drop]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)
