"""Layers of the models people run, [N outputs, K inputs], and masks like those that pruning makes."""

import torch

SHAPES = [
    (14336, 4096), (4096, 14336), (11008, 4096), (8192, 8192), (4096, 4096), (4096, 1024), (1024, 4096), (28672, 8192),
]  # fmt: skip
NORM_SPREAD = 1.0  # of the log of the activation norm; a few inputs of a real layer are ten times the median


def sparse(shape, pattern: str, mask: str = "random", seed: int = 0, device="cuda", dtype=torch.bfloat16):
    """A normal weight pruned per row to exactly equal counts ("0.6") or N:M ("2:4"), by random scores or by Wanda's.

    wanda: |W| times a log-normal activation norm per input, so kept weights crowd in some columns and gaps are long in others.
    """
    N, K = shape
    gen = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(N, K, generator=gen, device=device)
    if mask == "wanda":
        score = weight.abs() * torch.randn(K, generator=gen, device=device).mul(NORM_SPREAD).exp()
    else:
        score = torch.rand(N, K, generator=gen, device=device)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        drop = score.view(N, K // m, m).topk(m - n, largest=False).indices
        return weight.view(N, K // m, m).scatter_(2, drop, 0.0).view(N, K).to(dtype)
    drop = score.topk(K - round(K * (1 - float(pattern))), largest=False).indices
    return weight.scatter_(1, drop, 0.0).to(dtype)


def density(pattern: str) -> float:
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return n / m
    return 1 - float(pattern)
