"""SAAP (arXiv:2412.15127): fuse two importances by their uncertainty, and let the stability of the fused one say where to prune.

No code is public and the text leaves the formulas open, so what follows is a reconstruction, every open choice an option.

Fusion. Vector-wise and element-wise importance are two outputs with Gaussian noise of their own, whose scales minimise
I_v / (2 s_v^2) + I_e / (2 s_e^2) + log s_v + log s_e. F1: one scale for all attentions and one for all MLPs, in closed form s^2 = mean I.
F2: the same, learned by gradient descent over the batches. F3: one for each unit, so that units rank by I_v I_e.

Search. The adaptive stability indicator of a unit is the relative fluctuation of its fused importance over the batches, var / mean^2. S1, the
literal reading: the most unstable units go, wherever they are. S2: the least important go, and unstable halves of layers lose more of theirs, in
proportion to their mean indicator. Which options are the default was chosen on calibration text kept back, by benchmarks/width.py.
"""

import torch
from torch import nn

from dlpkit import units
from dlpkit.edits import Half
from dlpkit.gradients import AGGREGATIONS, Terms, terms
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target, check_target
from dlpkit.structure._width import MULTIPLE, choose, rooms, shares

FUSIONS = ("F1", "F2", "F3")
SEARCHES = ("S1", "S2")
LEARNING_RATE = 0.1  # of log s, for F2


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, fusion: str = "F1", search: str = "S2", aggregation: str = "sum",
    first: int | None = None, last: int | None = None, multiple: int = MULTIPLE, journal: None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """fusion, search: as above. aggregation: over the Linears of a group. first, last: layers left alone. An integer target counts units."""
    check_target(target)
    if len(batches) < 2:
        raise ValueError(
            f"saap compares batches, so it wants two or more, got {len(batches)}: take a smaller batch size"
        )
    _check(fusion, search, aggregation)
    rooms(model, first, last, multiple)
    return decide(model, terms(model, batches, progress), target, fusion, search, aggregation, first, last, multiple)


def decide(
    model: nn.Module, found: dict[Half, Terms], target: Target, fusion: str = "F1", search: str = "S2", aggregation: str = "sum",
    first: int | None = None, last: int | None = None, multiple: int = MULTIPLE,
) -> Plan:  # fmt: skip
    """`plan` from terms that were measured before."""
    _check(fusion, search, aggregation)
    held = rooms(model, first, last, multiple)
    fused = fuse({half: found[half] for half in held}, fusion, aggregation)
    unstable = {half: instability(importance) for half, importance in fused.items()}
    if search == "S1":
        return choose(model, {half: -value for half, value in unstable.items()}, target, held)
    scores = {half: importance.mean(0) for half, importance in fused.items()}
    return choose(model, shares(scores, _weights(unstable)), target, held)


def fuse(found: dict[Half, Terms], fusion: str, aggregation: str = "sum") -> dict[Half, torch.Tensor]:
    """Terms of halves -> [batches, units] fused importance of each."""
    fused = {}
    for part in units.PARTS:
        names = [half for half in found if half[1] == part]
        if not names:
            continue
        sizes = [found[half].element.shape[-1] for half in names]
        both = [torch.cat([found[half].each(kind, aggregation) for half in names], 1) for kind in ("vector", "element")]
        if fusion == "F3":
            whole = (both[0] * both[1]).sqrt()
        else:
            whole = sum(values / (2 * (values.mean() if fusion == "F1" else _learned(values))) for values in both)
        fused |= zip(names, whole.split(sizes, 1), strict=True)
    return fused


def instability(importance: torch.Tensor) -> torch.Tensor:
    """[batches, units] -> [units], var / mean^2 over the batches; 0 for a unit that no batch gives any importance."""
    mean = importance.mean(0)
    return torch.where(mean > 0, importance.var(0) / mean.square(), 0.0)


def _check(fusion: str, search: str, aggregation: str) -> None:
    for what, value, known in (
        ("fusion", fusion, FUSIONS),
        ("search", search, SEARCHES),
        ("aggregation", aggregation, AGGREGATIONS),
    ):
        if value not in known:
            raise ValueError(f"saap's {what} is one of {', '.join(known)}, got {value!r}")


def _learned(values: torch.Tensor) -> torch.Tensor:
    """[batches, units] -> s^2 after one step of gradient descent on log s per batch, from the optimum of the first."""
    means = values.mean(1)
    log_scale = means[0].log() / 2
    for mean in means:
        log_scale = log_scale - LEARNING_RATE * (1 - mean / (2 * log_scale).exp())
    return (2 * log_scale).exp()


def _weights(unstable: dict[Half, torch.Tensor]) -> dict[Half, float]:
    """How much more than the average of its kind each half is to lose."""
    means = {half: value.mean().item() for half, value in unstable.items()}
    totals = {part: [value for half, value in means.items() if half[1] == part] for part in units.PARTS}
    return {half: max(value / (sum(totals[half[1]]) / len(totals[half[1]])), 1e-6) for half, value in means.items()}
