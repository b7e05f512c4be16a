"""AlphaPruning (arXiv:2410.10912): a block whose weights have a heavier-tailed spectrum is better trained and kept denser.

Per Linear, the eigenvalues of W^T W above some x_min are taken to follow a power law; Hill's estimate of its exponent, with the x_min
near the peak of the log-histogram that fits best by Kolmogorov and Smirnov's distance ("alpha_peak"). No text is read.
"""

from collections.abc import Iterable

import torch

from dlpkit.allocation import exact
from dlpkit.kernels.score import Scores

NEEDS = "weights"
BINS = 100  # of the log10 histogram whose peak starts the search
NEAR = (0.95, 1.5)  # x_min is searched between these multiples of the peak


def summarise(parts: Iterable[Scores]) -> float:
    """Mean exponent of a block's weights; larger means lighter tails."""
    exponents = [exponent(torch.linalg.svdvals(part.weight.float()).double().square()) for part in parts]
    return sum(exponents) / len(exponents)


def sparsities(summaries: torch.Tensor, sizes: torch.Tensor, target: float, eps: float = 0.3) -> torch.Tensor:
    """[B] exponents, [B] parameter counts -> [B] sparsities in proportion to 1 - eps .. 1 + eps."""
    alpha, sizes = summaries.double(), sizes.double()
    extent = alpha.max() - alpha.min()
    factor = 1 - eps + 2 * eps * (alpha - alpha.min()) / extent if extent > 0 else torch.ones_like(alpha)
    return exact(target * factor / ((factor * sizes).sum() / sizes.sum()), sizes, target)


def exponent(eigenvalues: torch.Tensor) -> float:
    """Power-law exponent of the tail of [n] eigenvalues: 1 + n / sum(log(x / x_min)) over the x >= x_min."""
    x = eigenvalues[eigenvalues > 0].sort().values
    logs = x.log10().float().cpu()
    counts, edges = torch.histogram(logs, BINS)
    peak = 10 ** edges[counts.argmax()].item()
    starts = ((x >= NEAR[0] * peak) & (x <= NEAR[1] * peak)).nonzero().flatten().tolist()
    fits = [_fit(x[start:]) for start in starts if len(x) - start > 1]
    return min(fits)[1] if fits else _fit(x)[1]


def _fit(tail: torch.Tensor) -> tuple[float, float]:
    """(KS distance, exponent) of an ascending tail that starts at x_min."""
    n = len(tail)
    ratio = tail / tail[0]
    alpha = 1 + n / ratio.log().sum().clamp_min(1e-12)
    empirical = torch.arange(n, dtype=tail.dtype, device=tail.device) / n
    return (1 - ratio ** (1 - alpha) - empirical).abs().max().item(), alpha.item()
