"""How alike the outputs of any two layers are: CKA (arXiv:1905.00414) of minibatches with the unbiased HSIC (arXiv:2010.15327, eq. 3).

Patches of alike layers on the diagonal are what sliding layer merging (arXiv:2502.19159) sets out from; no method here computes with them.
"""

import torch
from torch import nn

from dlpkit import archs
from dlpkit.calibration import Stream
from dlpkit.progress import Progress, silent

FEWEST = 4  # windows in a batch: n (n - 3) divides


def similarity(model: nn.Module, batches: list[torch.Tensor], progress: Progress = silent) -> torch.Tensor:
    """[B, T] token windows, B >= 4 -> [layers, layers] float64, 1 for outputs that are one another turned and scaled.

    A window is one sample, the outputs of all its tokens its features. Raises ValueError for smaller batches.
    """
    if min(len(batch) for batch in batches) < FEWEST:
        raise ValueError(f"CKA wants batches of at least {FEWEST} windows, got {[len(batch) for batch in batches]}")
    stream = Stream(model, archs.of(model), batches, model.get_input_embeddings().weight.device)
    grams: list[list[torch.Tensor]] = []  # per layer, [B, B] of every batch
    for layer in range(len(stream.blocks)):
        stream.advance(layer)
        grams.append([_gram(hidden) for hidden in stream.hidden])
        progress("measure", layer + 1, len(stream.blocks))
    dependence = torch.tensor([[sum(map(hsic, a, b)) for b in grams] for a in grams], dtype=torch.float64)
    scale = dependence.diagonal().sqrt()
    return dependence / (scale[:, None] * scale)


def hsic(K: torch.Tensor, L: torch.Tensor) -> float:
    """Two Gram matrices [n, n] of n samples, their diagonals zero -> the unbiased estimate of their dependence."""
    n = len(K)
    means = K.sum() * L.sum() / ((n - 1) * (n - 2))
    return ((K * L).sum() + means - 2 / (n - 2) * (K.sum(0) @ L.sum(0))).item() / (n * (n - 3))


def _gram(hidden: torch.Tensor) -> torch.Tensor:
    rows = hidden.flatten(1).float()
    return (rows @ rows.T).double().cpu().fill_diagonal_(0)
