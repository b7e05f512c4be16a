"""Which runtime layout a weight gets where it lives, which kernel then multiplies, and why: dense unless a sparse one was measured to win.

Measured on an H100 (benchmarks/results/h100.jsonl), one row of x, random and Wanda-like masks, against the better of cuBLAS and a
dense Triton GEMV. Packing is for decoding: past WALK_ROWS rows of x, BATCH_ROWS for `tile`, every packed layer is expanded to dense at
every call. `tile` is for batches and never picked by itself: its kernels have no rows there yet, and at one row of x `sell` is faster.
"""

import torch

from dlpkit.kernels import formats, storage
from dlpkit.kernels.formats import nm
from dlpkit.kernels.runtime import GLUON, HAS_TRITON, use_wgmma
from dlpkit.kernels.tiles import BATCH_ROWS, FEW_ROWS, SMALLEST, WALK_ROWS

MEASURED = {(9, 0): "H100"}  # compute capability -> where the table was filled
DENSEST = 0.5  # share of weights kept up to which a packed kernel won on every layer measured


def choose(weight: torch.Tensor) -> tuple[str, str]:
    """[N, K] with zeros -> (format, reason in one sentence). Never a format whose kernel does not win on the weight's device."""
    runs, reason = available(weight.device)
    if not runs:
        return "dense", reason
    density = storage.count(weight) / max(1, weight.numel())
    return choose_for(tuple(weight.shape), weight.dtype, density, _nm(weight))


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


def path(
    format: str, N: int, K: int, M: int, density: float, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> tuple[str, str]:
    """(kernel, reason): what multiplies M rows of x by an [N, K] weight of `density` kept weights packed in a format on a device.

    Kernels: cublas, reference, walk, pick, batch, special, expand (which is followed by cuBLAS). N, K and density decide for no kernel
    yet; they only say how many bytes an expansion moves. Raises ValueError for an unknown format.
    """
    formats.get(format)
    device = torch.device(device)
    if format == "dense":
        return "cublas", "the weight is dense"
    if device.type != "cuda" or not HAS_TRITON or dtype not in (torch.bfloat16, torch.float16):
        return "reference", "Triton's kernels take 16-bit weights on a GPU: decoded to dense at every call"
    megabytes = (20 * density + 16) / 8 * N * K / 1e6
    expanded = f"expanded to dense, which moves {megabytes:.0f} MB, and multiplied by cuBLAS"
    if format != "tile":
        if M <= WALK_ROWS:
            return {"sell": "walk", "nm": "pick"}[format], f"{M} rows of x, of at most {WALK_ROWS}"
        return "expand", f"{M} rows of x are more than {WALK_ROWS}: {expanded}"
    if not use_wgmma(device):
        return "expand", f"the batch kernels want a Hopper GPU and Triton {' or '.join(GLUON)}: {expanded}"
    if M > BATCH_ROWS:
        return "expand", f"{M} rows of x are more than {BATCH_ROWS}: {expanded}"
    return "batch" if M <= FEW_ROWS else "special", f"{M} rows of x, of at most {BATCH_ROWS}"


def choose_for(
    shape: tuple[int, int], dtype: torch.dtype, density: float, pattern: tuple[int, int] | None
) -> tuple[str, str]:
    """The same for a GPU where the kernels were measured, from what matters about a weight; `pattern` is (n, m) if it is N:M sparse."""
    N, K = shape
    if dtype not in (torch.bfloat16, torch.float16):
        return "dense", f"the sparse kernels take 16-bit weights, this one is {str(dtype).removeprefix('torch.')}"
    if N * K < SMALLEST:
        return "dense", f"a {N} x {K} weight is too small for a sparse kernel to win"
    if density > DENSEST + 0.001:
        return "dense", f"{density:.0%} of the weights are kept, a sparse kernel wins up to {DENSEST:.0%}"
    if pattern and pattern[0] / pattern[1] <= 1.02 * density:  # full groups: not unstructured by nature
        return "nm", f"{pattern[0]}:{pattern[1]} sparse"
    return "sell", f"{1 - density:.0%} sparse without structure"


def _nm(weight: torch.Tensor) -> tuple[int, int] | None:
    try:
        return nm.infer(weight)
    except ValueError:
        return None
