"""The one weight-pruning loop: criterion, allocation and pattern are independent choices.

An allocation that looks at the model gets one dense pass over the text (blocks in order, dense activations). The pruning pass feeds
each block from the already pruned ones before it: measure the block's inputs, score, select, zero, go on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from dlpkit import allocation as allocations
from dlpkit import archs
from dlpkit import criteria as methods
from dlpkit.archs import Arch
from dlpkit.calibration import Stats, Stream
from dlpkit.journal import Journal
from dlpkit.kernels.runtime import default_device
from dlpkit.kernels.score import Scores
from dlpkit.kernels.select import zero_
from dlpkit.offload import Resident
from dlpkit.patterns import Pattern
from dlpkit.progress import Progress, silent

GRANULARITIES = ("block", "linear")


@dataclass
class PrunedLinear:
    block: int
    name: str
    pattern: str
    weights: int
    zeros: int


@dataclass
class PruneReport:
    criterion: str
    allocation: str
    pattern: str
    granularity: str
    linears: list[PrunedLinear] = field(default_factory=list)
    summaries: list[float] = field(default_factory=list)  # one per block or per Linear, empty for uniform
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

    @property
    def sparsity(self) -> float:
        weights = sum(linear.weights for linear in self.linears)
        return sum(linear.zeros for linear in self.linears) / weights if weights else 0.0


def prune(
    model: nn.Module, batches: list[torch.Tensor] | torch.Tensor,
    criterion: str = "wanda", pattern: str | float | Pattern = 0.5, allocation: str = "uniform",
    options: dict | None = None, granularity: str = "block",
    device: torch.device | str | None = None, journal: Journal | None = None, progress: Progress = silent,
) -> PruneReport:  # fmt: skip
    """Zero weights of a dense causal LM in place.

    batches: [B, T] int64 token ids each, or one tensor [W, T] of windows read one by one, for criteria and allocations that need
    activations. options: the allocation's own (alpha, strategy, ...). granularity: one sparsity per "block" or per "linear". device: where one block at a time is computed;
    default the GPU if there is one. Raises ValueError for names, patterns or options that do not fit, before any work.
    """
    batches = list(batches.split(1)) if isinstance(batches, torch.Tensor) else batches
    method, allocator = methods.get(criterion), allocations.get(allocation)
    check(model, pattern, allocation, options or {}, granularity)
    pattern, arch = Pattern.parse(pattern), archs.of(model)
    device = default_device(device)
    report = PruneReport(criterion, allocation, str(pattern), granularity)
    with _timed(report, "allocate"):
        summaries = summarise(model, arch, batches, allocator, options, granularity, device, journal, progress)
        patterns = plan(model, arch, pattern, allocator, summaries, options, granularity)
        report.summaries = [value for block in summaries for value in block]
    with _timed(report, "prune"):
        report.linears = apply(model, arch, batches, method, patterns, device, journal, progress)
    return report


def check(model: nn.Module, pattern: str | float | Pattern, allocation: str, options: dict, granularity: str) -> None:
    """Raise ValueError for a request that the model cannot follow."""
    pattern = Pattern.parse(pattern)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is one sparsity per {' or per '.join(GRANULARITIES)}, got {granularity!r}")
    allocations.split_options(allocations.get(allocation), options)
    for name, linear in archs.model_linears(model, archs.of(model)):
        if linear.weight.shape != (linear.out_features, linear.in_features):
            raise ValueError(
                f"{name} is packed already: prune the dense model, or unpack it first with `dlpkit pack --to dense`"
            )
        pattern.check(linear.in_features, name)


def summarise(
    model: nn.Module, arch: Arch, batches: list[torch.Tensor],
    allocator: ModuleType, options: dict | None = None, granularity: str = "block",
    device: torch.device | str = "cpu", journal: Journal | None = None, progress: Progress = silent,
) -> list[list[float]]:  # fmt: skip
    """Per block, the allocation's summary of the block, or of each of its Linears. One dense pass if it walks scores."""
    if allocator.NEEDS is None:
        return []
    how, _ = allocations.split_options(allocator, options or {})
    blocks = archs.blocks(model, arch)
    found = [journal.summary(index) if journal else None for index in range(len(blocks))]
    if all(found):
        return found
    stream = Stream(model, arch, batches, device) if allocator.NEEDS == "scores" else None
    resident = stream.resident if stream else Resident(blocks, torch.device(device))
    for index, block in enumerate(blocks):
        with resident.at(index):
            if not found[index]:
                stats = stream.stats(index, {"sq"}, advance=True) if stream else {}
                units = _units(block, arch, granularity)
                found[index] = [allocator.summarise(_scores(linears, stats), **how) for linears in units]
                if journal:
                    journal.keep_summary(index, found[index])
            elif stream:
                stream.advance(index)
        progress("measure", index + 1, len(blocks))
    return found


def plan(
    model: nn.Module, arch: Arch, pattern: Pattern,
    allocator: ModuleType, summaries: list[list[float]], options: dict | None = None, granularity: str = "block",
) -> list[dict[str, Pattern]]:  # fmt: skip
    """Per block, the pattern of each of its Linears, so that the mean sparsity over all weights is the pattern's."""
    _, how = allocations.split_options(allocator, options or {})
    units = [_units(block, arch, granularity) for block in archs.blocks(model, arch)]
    flat = [unit for block in units for unit in block]
    sizes = torch.tensor([sum(linear.weight.numel() for linear in unit.values()) for unit in flat], dtype=torch.float64)
    values = torch.tensor([value for block in summaries for value in block], dtype=torch.float64)
    if len(values) and not torch.isfinite(values).all():
        raise ValueError(
            "the allocation's summaries hold NaN or Inf: the weights or activations of a block are not finite"
        )
    sparsities = allocator.sparsities(values, sizes, pattern.sparsity, **how)
    chosen = iter(patterns_of(pattern, sparsities.tolist(), sizes.tolist()))
    return [{name: p for unit in block for p in [next(chosen)] for name in unit} for block in units]


def patterns_of(pattern: Pattern, sparsities: list[float], sizes: list[float]) -> list[Pattern]:
    """One pattern per sparsity. N:M becomes mixed: whole N of at least 1, rounded so that the weights kept in all come closest."""
    if not pattern.m:
        return [pattern.at(sparsity) for sparsity in sparsities]
    wanted = [(1 - sparsity) * pattern.m for sparsity in sparsities]
    n = [min(max(int(w + 1e-9), 1), pattern.m) for w in wanted]
    budget = pattern.n * sum(sizes) - sum(a * size for a, size in zip(n, sizes, strict=True))
    for i in sorted(range(len(n)), key=lambda i: n[i] - wanted[i]):  # largest remainder first
        if n[i] < pattern.m and n[i] < wanted[i] and budget >= sizes[i] / 2:
            n[i], budget = n[i] + 1, budget - sizes[i]
    return [Pattern.parse(f"{a}:{pattern.m}") for a in n]


def apply(
    model: nn.Module, arch: Arch, batches: list[torch.Tensor], method: ModuleType, patterns: list[dict[str, Pattern]],
    device: torch.device | str = "cpu", journal: Journal | None = None, progress: Progress = silent,
) -> list[PrunedLinear]:  # fmt: skip
    """Prune every block by its patterns, each from the already pruned ones before it."""
    blocks, done = archs.blocks(model, arch), []
    stream = Stream(model, arch, batches, device) if method.NEEDS else None
    resident = stream.resident if stream else Resident(blocks, torch.device(device))
    for index, block in enumerate(blocks):
        linears = archs.linears(block, arch)
        kept = journal.block(index) if journal else None
        with resident.at(index):
            stats = stream.stats(index, method.NEEDS) if stream and kept is None else {}
            for name, linear in linears.items():
                weight, full_name = linear.weight.data, f"{arch.blocks}.{index}.{name}"
                if kept is None:
                    prune_(weight, stats.get(name), method, patterns[index][name], full_name)
                else:
                    weight.copy_(kept[name])
                zeros = int((weight == 0).sum())
                done.append(PrunedLinear(index, full_name, str(patterns[index][name]), weight.numel(), zeros))
            resident.changed(linear.weight for linear in linears.values())
            if stream and index + 1 < len(blocks):
                stream.advance(index)
        if journal and kept is None:
            journal.keep_block(index, {name: linear.weight for name, linear in linears.items()})
        progress("prune", index + 1, len(blocks))
    return done


def prune_(weight: torch.Tensor, stats: Stats | None, method: ModuleType, pattern: Pattern, name: str) -> None:
    """Zero an [N, K] weight by `pattern` in place: repaired by the criterion's `solve` if it has one, else selected by its scores.

    Raises ValueError, naming the Linear, for a weight that is not finite or that the criterion cannot prune.
    """
    try:
        if hasattr(method, "solve"):
            weight.copy_(method.solve(weight, stats, pattern))
        else:
            zero_(method.scores(weight, stats), pattern.cut(weight.shape, method.PER))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _scores(linears: dict[str, nn.Linear], stats: dict[str, Stats]) -> list[Scores]:
    """Wanda's scores of some Linears, or magnitudes if there are no statistics."""
    return [Scores(linear.weight.data, stats[name].sq.sqrt() if stats else None) for name, linear in linears.items()]


def _units(block: nn.Module, arch: Arch, granularity: str) -> list[dict[str, nn.Linear]]:
    """The Linears that share one sparsity: all of a block, or each alone."""
    linears = archs.linears(block, arch)
    return [linears] if granularity == "block" else [{name: linear} for name, linear in linears.items()]


@contextmanager
def _timed(report: PruneReport, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.seconds[stage] = time.perf_counter() - start
