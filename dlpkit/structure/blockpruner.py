"""BlockPruner (arXiv:2406.10594, algorithm 1): remove attentions and MLPs one by one, each the one whose absence costs least perplexity."""

import torch
from torch import nn

from dlpkit import archs, surgery
from dlpkit.edits import Drop
from dlpkit.journal import Journal
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target
from dlpkit.structure._greedy import greedy

MODES = {"mix": ("attn", "mlp"), "attn": ("attn",), "mlp": ("mlp",)}


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, mode: str = "mix", lazy: bool = False, early: float = 0.0,
    journal: Journal | None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """mode: "mix", or "attn" or "mlp" alone. lazy, early: ask fewer candidates, or ask them less (structure/_greedy.py). An integer target counts halves of layers."""
    if mode not in MODES:
        raise ValueError(f"blockpruner's mode is {', '.join(MODES)}, got {mode!r}")
    there = sorted(surgery.present(model, archs.of(model)))
    return greedy(
        model,
        batches,
        target,
        [Drop(*half) for half in there if half[1] in MODES[mode]],
        lazy,
        early,
        journal,
        progress,
    )
