"""Sliding layer merging (arXiv:2502.19159): from the top down, merge windows of layers while the last hidden state stays like the original's.

A window grows downwards as long as the cosine of the last hidden states, a whole sequence as one vector, stays above a threshold; then it
is merged and the next one starts at the layer that failed. The last layer is never touched, and a window that reaches layer 0 is merged
too (the released code loses it). For a target, thresholds are searched: how much a threshold removes need not be monotonous in it.
"""

from itertools import pairwise

import torch
from torch import nn

from dlpkit import parallel
from dlpkit.edits import Merge
from dlpkit.journal import Journal
from dlpkit.progress import Progress, silent
from dlpkit.structure import Budget, Plan, Target, check_target, reached, windows
from dlpkit.trunk import Trunk

GRID = 24  # thresholds between 0 and 1 that are tried first
HALVINGS = 8  # of every interval between two of them across which the target is passed


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target | None, rule: str = "replace", threshold: float | None = None,
    journal: Journal | None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """rule: of dlpkit.edits.Merge. threshold: walk at this one, with no target. An integer target counts layers.

    Of all walks that reach the target, the one that removes least, and of those the one that stays most like the original.
    """
    if (target is None) == (threshold is None):
        raise ValueError("sliding_merge wants either a target or a threshold")
    budget = Budget(model)
    with Trunk(model, windows(batches)) as trunk:
        walks = _Walks(trunk, budget, rule, journal)
        if threshold is None:
            check_target(target)
            found = [merged for merged in _search(walks, budget, target, progress) if _reaches(budget, merged, target)]
            merged = min(found, key=lambda merged: (budget.share(merged), -walks.similarity(merged)))
        else:
            merged = walks.walk(threshold)
        similarities = [walks.similarity(merged[: n + 1]) for n in range(len(merged))]
    return budget.plan(merged, similarities, "similarity", trunk.work)


class _Walks:
    """The walks down the model, one per threshold; what two walks ask in common is measured once."""

    def __init__(self, trunk: Trunk, budget: Budget, rule: str, journal: Journal | None):
        self.trunk, self.budget, self.rule, self.journal = trunk, budget, rule, journal
        self.original, self.known = trunk.last_hidden(), {}
        while (row := parallel.told(journal.step(len(self.known)) if journal else None)) is not None:
            self.known[tuple(map(tuple, row[0]))] = row[1]

    def walk(self, threshold: float) -> list[Merge]:
        """The windows that a threshold merges, from the top down."""
        merged: list[Merge] = []
        high = self.trunk.layers - 2
        while high > 0:
            low = high
            while low > 0 and self.stays_like([*merged, Merge(low - 1, high, self.rule)], threshold):
                low -= 1
            if low < high:
                merged.append(Merge(low, high, self.rule))
            high = low - 1
        return merged

    def stays_like(self, merged: list[Merge], threshold: float) -> bool:
        """Whether such windows can be merged, which layers that lack a half cannot, and leave the last hidden states alike."""
        return self.budget.fits(merged) and self.similarity(merged) > threshold

    def similarity(self, merged: list[Merge]) -> float:
        key = tuple((edit.low, edit.high) for edit in merged)
        if key not in self.known:
            (found,) = self.trunk.similarities([tuple(merged)], self.original)
            if self.journal and parallel.first():
                self.journal.keep_step(len(self.known), [key, found])
            self.known[key] = found
        return self.known[key]


def _search(walks: _Walks, budget: Budget, target: Target, progress: Progress) -> list[list[Merge]]:
    """Walks over a grid of thresholds, and closer wherever one that reaches the target is next to one that does not."""
    found = {-1.0: walks.walk(-1.0)}
    if not _reaches(budget, found[-1.0], target):
        raise ValueError(
            f"target {target} is out of reach: merging all layers but the last removes {budget.share(found[-1.0]):.1%}"
        )
    for step in range(GRID + 1):
        found[step / GRID] = walks.walk(step / GRID)
        progress("search", step + 1, GRID + 1)
    for low, high in list(pairwise(sorted(found))):
        for _ in range(HALVINGS):
            if _reaches(budget, found[low], target) == _reaches(budget, found[high], target):
                break
            middle = (low + high) / 2
            found[middle] = walks.walk(middle)
            low, high = (
                (middle, high)
                if _reaches(budget, found[middle], target) == _reaches(budget, found[low], target)
                else (low, middle)
            )
    return list(found.values())


def _reaches(budget: Budget, merged: list[Merge], target: Target) -> bool:
    return reached(target, sum(edit.high - edit.low for edit in merged), budget.share(merged))
