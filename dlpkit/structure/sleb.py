"""SLEB (arXiv:2402.09025): remove layers one by one, each the one whose absence costs least loss; never the first or the last."""

import torch
from torch import nn

from dlpkit.edits import Drop
from dlpkit.journal import Journal
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target
from dlpkit.structure._greedy import greedy


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, lazy: bool = False, early: float = 0.0,
    journal: Journal | None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """lazy, early: ask fewer candidates, or ask them less (structure/_greedy.py). An integer target counts layers."""
    inner = range(1, model.config.num_hidden_layers - 1)
    return greedy(model, batches, target, [Drop(layer, "layer") for layer in inner], lazy, early, journal, progress)
