"""Which kernel of a format multiplies M rows of x fastest, and how fast: the nearest class of the measured table.

Of what was not measured: the nearest measured shape, in doublings of N and of K; there the mask of the same kind, then the nearest
share of weights kept; and the next larger measured M, because kernels take rows of x in steps. A kernel is out past the last M that it
was measured at; an expansion, whose share of the time only falls, is not.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from dlpkit.kernels.measured import SPEED

EXPAND = "expand"  # to dense, followed by cuBLAS


class Layer(NamedTuple):
    """A class of layers that was measured. mask: unstructured or N:M."""

    N: int
    K: int
    kept: float
    mask: str

    def __str__(self) -> str:
        return f"{self.N} x {self.K}, {1 - self.kept:.0%} sparse, {self.mask}"


class Choice(NamedTuple):
    kernel: str
    speed: float  # times cuBLAS on the dense weight at as many rows of x; 0 where nothing was measured
    layer: Layer | None  # where that was measured


def fastest(format: str, N: int, K: int, M: int, kept: float, mask: str = "unstructured") -> Choice:
    """For M rows of x and an [N, K] weight packed in a format, `kept` of its values stored."""
    if format not in SPEED:
        return Choice(EXPAND, 0.0, None)
    layer, kernels = _nearest(format, max(1, N), max(1, K), kept, mask)
    speeds = {EXPAND: 0.0}
    for kernel, measured in kernels.items():
        enough = [rows for rows in measured if rows >= M]
        if enough or kernel == EXPAND:
            speeds[kernel] = measured[min(enough, default=max(measured))]
    best = max(speeds, key=speeds.get)
    return Choice(best, speeds[best], layer)


def best(
    N: int, K: int, M: int, kept: float, mask: str, runs: Callable[[str], bool] = lambda format: True
) -> tuple[str, Choice]:
    """The format whose fastest kernel is fastest, of those that take the mask and that `runs` says run, and that kernel."""
    takes = [format for format in SPEED if _takes(format, mask) and runs(format)]
    found = {format: fastest(format, N, K, M, kept, mask) for format in takes}
    format = max(found, key=lambda format: found[format].speed)
    return format, found[format]


@functools.lru_cache(maxsize=4096)
def _nearest(format: str, N: int, K: int, kept: float, mask: str) -> tuple[Layer, dict[str, dict[int, float]]]:
    """The nearest class, and what was measured there: kernel -> M -> speed."""

    def far(layer: Layer) -> tuple[float, bool, float]:
        doublings = abs(math.log2(N / layer.N)) + abs(math.log2(K / layer.K))
        return doublings, (":" in mask) != (":" in layer.mask), abs(kept - layer.kept)

    layer = min((Layer(*where) for _, *where in SPEED[format]), key=far)
    return layer, {kernel: speeds for (kernel, *where), speeds in SPEED[format].items() if Layer(*where) == layer}


def _takes(format: str, mask: str) -> bool:
    if format == "nm":
        return ":" in mask
    return format != "fragment" or mask == "2:4"
