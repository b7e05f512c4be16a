"""2:4 products by cuSPARSELt, through the operators that torch has for it.

The library computes W x^T with W compressed, for rows of x in multiples of 8, and writes y in either order: as [M, N] here, for
no algorithm for the other order saves what it costs to turn y after.
"""

import torch
from torch.backends import cusparselt

from dlpkit.kernels import algorithms

ROWS = 8  # of x, in multiples of which the library multiplies
ALIGNED = 16  # bytes
CHUNK = 512  # columns decoded at a time


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, N: int, K: int) -> torch.Tensor:
    """x [M, K] of any strides, a compressed [N, K] -> [M, N]."""
    M = x.shape[0]
    if not M:
        return x.new_empty(0, N)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -M % ROWS)) if M % ROWS else x
    where = torch.cuda.get_device_capability(x.device), cusparselt.version()
    algorithm = algorithms.choose(N, K, padded.shape[0], where)
    return product(_aligned(padded), weight, None if bias is None else _aligned(bias.to(x.dtype)), algorithm)[:M]


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, algorithm: int) -> torch.Tensor:
    """x [M, K] contiguous, M a multiple of 8 -> [M, N]. Raises RuntimeError for an algorithm that the library does not have."""
    return torch._cslt_sparse_mm(weight, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)


def dense(weight: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """A compressed [N, K] -> [N, K], multiplied by the identity: each sum has one term that is not zero, so it is exact for what
    `formats.cusparselt` packs. The library keeps the order of its bytes to itself.
    """
    out = torch.empty(N, K, dtype=weight.dtype, device=weight.device)
    for start in range(0, K, CHUNK):
        part = out[:, start : start + CHUNK]
        unit = torch.zeros(part.shape[1], K, dtype=weight.dtype, device=weight.device)
        unit.diagonal(start).fill_(1)
        part.copy_(product(unit, weight, None, algorithms.OWN).t())
    return out


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor
