"""Which runtime layout a weight gets where it lives, which kernel then multiplies, and why: dense unless a sparse one was measured to win.

Both are read off one table, measured.py, of how fast every kernel is by layer, mask and rows of x, by the rule of crossover.py for
what it does not hold. A weight is packed for the batch that it will mostly multiply; at any other number of rows the fastest
kernel of its format runs, which may be an expansion to dense at every call. `cusparselt` is not in the table: it runs where it is asked for
by name.
"""

import itertools

import torch

from dlpkit.kernels import algorithms, crossover, formats, storage
from dlpkit.kernels.formats import Packed, nm
from dlpkit.kernels.runtime import GLUON, HAS_GLUON, HAS_TRITON, use_wgmma
from dlpkit.kernels.tiles import SMALLEST

MEASURED = {(9, 0): "H100"}  # compute capability -> where the table was filled
WGMMA = ("tile", "fragment")  # formats whose kernels are Hopper's
LARGEST = 8192  # rows of x that are asked about
DENSEST = 0.5  # share of weights kept up to which packed kernels were measured


def choose(weight: torch.Tensor, batch: int = 1) -> tuple[str, str]:
    """[N, K] with zeros -> (format, reason in one sentence): the one measured to be fastest at `batch` rows of x, dense if none wins there."""
    if batch < 1:
        raise ValueError(f"batch is the rows of x that a weight will mostly multiply, at least 1, got {batch}")
    runs, reason = available(weight.device)
    if not runs:
        return "dense", reason
    if not weight.numel():
        return "dense", "the weight has no rows or no columns"
    density = storage.count(weight) / weight.numel()
    return choose_for(tuple(weight.shape), weight.dtype, density, _mask(weight, density), batch)


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether packed kernels are known to win on a device, and why or why not."""
    device = torch.device(device)
    if device.type != "cuda":
        return (
            False,
            f"no sparse kernel runs on {device.type}: packed weights are decoded to dense, smaller on disk only",
        )
    if not HAS_TRITON:
        return False, "Triton is not installed: packed weights are decoded to dense, smaller on disk only"
    capability = torch.cuda.get_device_capability(device)
    if capability not in MEASURED:
        known = ", ".join(MEASURED.values())
        return (
            False,
            f"the sparse kernels are measured on {known} only, not on this GPU: name a format to use one anyway",
        )
    return True, f"sparse kernels win here for 16-bit weights from {1 - DENSEST:.0%} sparsity"


def choose_for(
    shape: tuple[int, int], dtype: torch.dtype, density: float, mask: str, batch: int = 1
) -> tuple[str, str]:
    """The same for a GPU where the kernels were measured, from what matters about a weight; `mask` as crossover.Layer has it."""
    N, K = shape
    if dtype not in (torch.bfloat16, torch.float16):
        return "dense", f"the sparse kernels take 16-bit weights, this one is {str(dtype).removeprefix('torch.')}"
    if N * K < SMALLEST:
        return "dense", f"a {N} x {K} weight is too small for a sparse kernel to win"
    if density > DENSEST + 0.001:
        return "dense", f"{density:.0%} of the weights are kept, a sparse kernel wins up to {DENSEST:.0%}"
    best, found = crossover.best(N, K, batch, density, mask, lambda format: format not in WGMMA or HAS_GLUON)
    how = f"{best} at {_rows(batch)} was measured {found.speed:.2f} times as fast as cuBLAS ({found.layer})"
    return (best if found.speed >= 1 else "dense"), how


def explain(packed: Packed, M: int) -> tuple[str, str]:
    """(kernel, reason): what multiplies M rows of x by a packed weight where it lives. Of a dense one, what the best sparse kernel would do.

    Kernels: cublas, or torch's own on a CPU, reference, walk, pick, batch, mma, cusparselt, expand (which is followed by cuBLAS).
    """
    format, device, (N, K) = formats.name(type(packed)), packed.values.device, packed.shape
    if format == "dense":
        return "cublas" if device.type == "cuda" else "torch", f"the weight is dense: {choose(packed.values, M)[1]}"
    if device.type != "cuda" or not HAS_TRITON or packed.values.element_size() != 2:
        return "reference", "Triton's kernels take 16-bit weights on a GPU: decoded to dense at every call"
    if format in WGMMA and not use_wgmma(device):
        return "expand", f"the batch kernels want a Hopper GPU and Triton {' or '.join(GLUON)}"
    if format == "cusparselt":
        few = f"slower than cuBLAS on most dense weights below {algorithms.FEWEST} rows of x"
        many = f"faster than cuBLAS from {algorithms.FEWEST} rows of x on, less the half millisecond of the host that a product takes outside CUDA graphs"
        return "cusparselt", f"on an H100 cuSPARSELt is {few if M < algorithms.FEWEST else many}"
    kernel, speed, layer = crossover.fastest(format, N, K, M, packed.values.numel() / (N * K))
    if not speed:
        return kernel, f"nothing of {format} was measured at {_rows(M)}"
    return kernel, f"measured {speed:.2f} times as fast as cuBLAS at {_rows(M)} ({layer})"


def most_rows(packed: Packed) -> int:
    """The rows of x up to which a packed weight multiplies at least as fast as a dense one, where it lives; 0 if not even one."""
    format, device, (N, K) = formats.name(type(packed)), packed.values.device, packed.shape
    if not available(device)[0] or packed.values.element_size() != 2 or (format in WGMMA and not use_wgmma(device)):
        return 0
    kept = packed.values.numel() / max(1, N * K)
    won = itertools.takewhile(lambda M: crossover.fastest(format, N, K, M, kept).speed >= 1, range(1, LARGEST + 1))
    return max(won, default=0)


def _mask(weight: torch.Tensor, density: float) -> str:
    try:
        n, m = nm.infer(weight)
    except ValueError:
        return "unstructured"
    return f"{n}:{m}" if n / m <= 1.02 * density else "unstructured"  # full groups: not unstructured by nature


def _rows(M: int) -> str:
    return f"{M} row{'s' * (M != 1)} of x"
