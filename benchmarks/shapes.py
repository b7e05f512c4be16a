"""Layers of the models people run, [N outputs, K inputs], and sparse weights for them."""

import torch
from safetensors import safe_open

from dlpkit.kernels import storage

SHAPES = [
    (14336, 4096), (4096, 14336), (11008, 4096), (8192, 8192), (4096, 4096), (4096, 1024), (1024, 4096), (28672, 8192),
]  # fmt: skip
UNSTRUCTURED = ("0.5", "0.6", "0.7", "0.8")


def sparse(shape, pattern: str, masks: str | None = None, seed: int = 0, device="cuda", dtype=torch.bfloat16):
    """A normal weight pruned at random, per row or per row and block of columns to equal counts ("0.6", "0.6@256"), or N:M ("2:4");
    or as the file of masks.py has it.
    """
    N, K = shape
    gen = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(N, K, generator=gen, device=device)
    if masks:
        return torch.where(tiled(masks, pattern, shape).to(device), weight, 0.0).to(dtype)
    score = torch.rand(N, K, generator=gen, device=device)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        drop = score.view(N, K // m, m).topk(m - n, largest=False).indices
        return weight.view(N, K // m, m).scatter_(2, drop, 0.0).view(N, K).to(dtype)
    block = int(pattern.partition("@")[2] or K)
    drop = score.view(N, -1, block).topk(block - round(block * density(pattern)), largest=False).indices
    return weight.view(N, -1, block).scatter_(2, drop, 0.0).view(N, K).to(dtype)


def norms(K: int, generator: torch.Generator) -> torch.Tensor:
    """[K] float32 norms of inputs, log-normal: a few inputs of a real layer are ten times the median."""
    return torch.randn(K, generator=generator, device=generator.device).exp()


def tiled(path: str, pattern: str, shape: tuple[int, int]) -> torch.Tensor:
    """[N, K] bool from the masks of a narrower model: other rows for every stretch of columns."""
    N, K = shape
    with safe_open(path, "pt") as file:
        bits = file.get_tensor(pattern)
    width = 8 * bits.shape[1]
    tiles = -(-K // width)
    row = (torch.arange(N)[:, None] + N * torch.arange(tiles)) % len(bits)  # [N, tiles]
    return storage.unpack_mask(bits[row].flatten(1), K)


def density(pattern: str) -> float:
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return n / m
    return 1 - float(pattern.partition("@")[0])


def mask(pattern: str) -> str:
    """What the dispatcher's table calls the mask of a pattern: unstructured or N:M."""
    return pattern if ":" in pattern else "unstructured"
