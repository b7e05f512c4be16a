"""Times that mean something: a ring of operands larger than the L2 cache, replayed as one CUDA graph, medians of warm replays."""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace

import torch

RING_BYTES = 6  # times the L2 cache
TIMED_MS = 15
WARM_MS = 25  # a GPU that was waiting for the host is slow for some milliseconds


def ring_length(nbytes: int) -> int:
    """Copies of an operand that do not fit the L2 cache together."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-RING_BYTES * l2 // max(1, nbytes)))


def copies(value, n: int) -> list:
    """n deep copies of a tensor or of a frozen dataclass that holds tensors."""
    if isinstance(value, torch.Tensor):
        return [value.clone() for _ in range(n)]
    assert is_dataclass(value)
    tensors = {
        f.name: getattr(value, f.name) for f in fields(value) if isinstance(getattr(value, f.name), torch.Tensor)
    }
    return [replace(value, **{name: t.clone() for name, t in tensors.items()}) for _ in range(n)]


def clock(calls: list[Callable], timed_ms: float = TIMED_MS) -> tuple[float, float]:
    """Microseconds per call, and the spread (90th less 10th percentile) over the median. Replays for some milliseconds, after as many to warm up."""
    repeats = max(1, 24 // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * repeats:
            call()
    once = max(0.01, _replays(graph, 3)[-1])  # ms
    _replays(graph, int(max(timed_ms, WARM_MS) / once) + 1)
    took = [ms * 1e3 / (repeats * len(calls)) for ms in _replays(graph, max(9, int(timed_ms / once)))]
    tenths = statistics.quantiles(took, n=10)
    return statistics.median(took), (tenths[-1] - tenths[0]) / statistics.median(took)


def stopwatch(call: Callable, times: int = 7) -> tuple[float, float]:
    """Microseconds of a call that waits for the host, and the spread (largest less smallest) over the median."""
    took = []
    for _ in range(times + 1):  # the first one warms up
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(stop) * 1e3)
    took = took[1:]
    return statistics.median(took), (max(took) - min(took)) / statistics.median(took)


def copy_roof() -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock([lambda: target.copy_(source)])[0] / 1e3


def _replays(graph: torch.cuda.CUDAGraph, n: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
